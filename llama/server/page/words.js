// Every word of the page, in English and in Chinese. {name} stands for a value.

import { onSetting, settings } from "./settings.js";

const WORDS = {
  skip: ["Skip to the message box", "跳到输入框"],
  conversations: ["Conversations", "对话列表"],
  newChat: ["New chat", "新对话"],
  sidebar: ["Show or hide conversations", "显示或隐藏对话列表"],
  search: ["Search conversations", "搜索对话"],
  import: ["Import", "导入"],
  exportAll: ["Export all", "全部导出"],
  exportOne: ["Export", "导出"],
  view: ["View", "视图"],
  chat: ["Chat", "聊天"],
  notebook: ["Notebook", "笔记本"],
  split: ["Split", "分栏"],
  model: ["Model", "模型"],
  characters: ["Characters", "角色"],
  settings: ["Settings", "设置"],
  systemPrompt: ["System prompt", "系统提示词"],
  systemHint: ["Tell the model how to behave. Empty: the model's own.", "告诉模型该如何表现。留空则用模型自带的。"],
  greeting: ["What would you like to talk about?", "想聊点什么?"],
  greetingMore: [
    "Everything stays on this machine: the model runs here, conversations are kept in this browser.",
    "一切都留在本机:模型在这里运行,对话保存在此浏览器中。",
  ],
  messages: ["Messages", "消息"],
  message: ["Message", "输入消息"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  attach: ["Attach a text file", "附加文本文件"],
  toEnd: ["To the end", "回到底部"],
  user: ["You", "你"],
  assistant: ["Model", "模型"],
  tool: ["Tool", "工具"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  edit: ["Edit", "编辑"],
  regenerate: ["Answer anew", "重新回答"],
  goOn: ["Continue", "继续"],
  branchOff: ["Branch into a new conversation", "分支为新对话"],
  delete: ["Delete", "删除"],
  rename: ["Rename", "重命名"],
  pin: ["Pin", "置顶"],
  unpin: ["Unpin", "取消置顶"],
  more: ["More", "更多"],
  raw: ["Raw text", "原始文本"],
  probabilities: ["Probabilities", "概率"],
  tokenIds: ["Token ids", "词元编号"],
  earlier: ["Earlier version", "上一个版本"],
  later: ["Later version", "下一个版本"],
  versionOf: ["Version {n} of {all}", "第 {n} 个版本,共 {all} 个"],
  cancel: ["Cancel", "取消"],
  save: ["Save", "保存"],
  saveSend: ["Send as a branch", "另起分支发送"],
  saveOn: ["Save and continue", "保存并继续"],
  close: ["Close", "关闭"],
  ok: ["OK", "确定"],
  untitled: ["New chat", "新对话"],
  noneFound: ["Nothing found", "没有找到"],
  deleteConversation: ["Delete “{title}” with all its messages?", "删除“{title}”及其全部消息?"],
  deleteMessage: ["Delete this message and all that follow it?", "删除这条消息及其后的全部消息?"],
  renameTo: ["Name of the conversation", "对话名称"],
  importedN: ["{n} conversations were imported", "已导入 {n} 个对话"],
  notOurs: ["{name}: this is no export of conversations", "{name}:不是导出的对话文件"],
  notText: ["{name} is no text file of at most {size} KB", "{name} 不是不超过 {size} KB 的文本文件"],
  removeFile: ["Remove {name}", "移除 {name}"],
  thinking: ["Reading …", "读取中……"],
  interrupted: ["This answer was cut off.", "回答被中断。"],
  cutByLength: ["The answer reached its most tokens.", "回答达到了词元上限。"],
  cutByFilter: ["The model's chat format refuses this text.", "模型的对话格式拒绝了这段文本。"],
  stopped: ["Stopped.", "已停止。"],
  failed: ["The answer failed: {why}", "回答失败:{why}"],
  speed: ["{n} tokens/s", "{n} 词元/秒"],
  numTokens: ["{n} tokens", "{n} 个词元"],
  promptSpeed: ["prompt {n} at {speed}/s", "提示词 {n} 个,{speed}/秒"],
  promptCached: ["prompt {n} ({cached} remembered)", "提示词 {n} 个(其中 {cached} 个已缓存)"],
  contextUsed: ["Context: {used} of {all} tokens", "上下文:{used} / {all} 词元"],
  stateLoading: ["The model is loading. What you write is sent when it is there.", "模型正在加载,加载完成后会发送您的消息。"],
  stateDraining: ["The server is stopping. Trying again …", "服务器正在停止,正在重试……"],
  stateGone: ["The server cannot be reached. Trying again …", "无法连接服务器,正在重试……"],
  stateLocked: ["The server asks for an API key: give it in the settings.", "服务器需要 API 密钥:请在设置中填写。"],
  waitBusy: ["The server is busy. Trying again …", "服务器繁忙,正在重试……"],
  waitLine: ["In line, at place {n}", "排队中,第 {n} 位"],
  giveResult: ["Give the result of {name}", "填写 {name} 的结果"],
  pickToken: ["Take this token and continue", "选用此词元并继续"],
  restOf: ["all others: {share}", "其余全部:{share}"],
  tokensLabel: ["Tokens: arrow keys move", "词元:用方向键移动"],
  openToken: [
    "Choose a token to see what else the model thought of. Darker: less likely.",
    "点选一个词元,查看模型考虑过的其他可能。颜色越深,概率越低。",
  ],
  promptAsSent: ["The prompt as the model read it", "模型读到的提示词"],
  answerAsCame: ["The answer as it came", "模型的原始回答"],
  notebookHint: ["In this story,", "在这个故事里,"],
  output: ["Output", "输出"],
  outputHint: ["The model's text comes here.", "模型的输出会出现在这里。"],
  generate: ["Generate", "生成"],
  regenerateText: ["Regenerate", "重新生成"],
  undo: ["Undo", "撤销"],
  look: ["What the model makes of the text", "模型如何看待这段文本"],
  look_next: ["Next token", "下一个词元"],
  look_tokens: ["Tokens", "词元"],
  look_rendered: ["Rendered", "渲染效果"],
  systemRole: ["System", "系统"],
  codeCopy: ["Copy code", "复制代码"],
  copyTable: ["Copy table", "复制表格"],
};

const column = { en: 0, zh: 1 };

export function add(words) {
  Object.assign(WORDS, words);
}

/** A word in the person's language. */
export function t(key, values = {}) {
  const word = WORDS[key]?.[column[settings.language]];
  if (word === undefined) throw new Error(`there is no word ${key}`);
  return word.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Writes the words of what stands in the document. */
export function translate(root = document) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  for (const node of root.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.tLabel);
  }
}

export function startWords() {
  const write = () => {
    document.documentElement.lang = settings.language === "zh" ? "zh-CN" : "en";
    translate();
  };
  write();
  onSetting((name) => name === "language" && write());
}
