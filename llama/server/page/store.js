// What is kept in this browser: conversations, their messages as a tree, what is known of answers' tokens, characters.

const SCHEMA = { conversations: null, messages: "conversation", tokens: "conversation", characters: null };

let database;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function opened() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("llama", 1);
    request.onupgradeneeded = () => {
      for (const [name, index] of Object.entries(SCHEMA)) {
        const store = request.result.createObjectStore(name, { keyPath: "id" });
        if (index) store.createIndex(index, index);
      }
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return database;
}

async function store(name, mode = "readonly") {
  return (await opened()).transaction(name, mode).objectStore(name);
}

export const all = async (name) => settled((await store(name)).getAll());
export const get = async (name, id) => settled((await store(name)).get(id));
export const put = async (name, record) => settled((await store(name, "readwrite")).put(record));
export const remove = async (name, id) => settled((await store(name, "readwrite")).delete(id));
export const ofConversation = async (name, id) => settled((await store(name)).index("conversation").getAll(id));

export async function putAll(name, records) {
  const into = await store(name, "readwrite");
  await Promise.all(records.map((record) => settled(into.put(record))));
}

export async function removeConversation(id) {
  const transaction = (await opened()).transaction(["conversations", "messages", "tokens"], "readwrite");
  transaction.objectStore("conversations").delete(id);
  for (const name of ["messages", "tokens"]) {
    const cursor = transaction.objectStore(name).index("conversation").openKeyCursor(IDBKeyRange.only(id));
    cursor.onsuccess = () => {
      if (!cursor.result) return;
      transaction.objectStore(name).delete(cursor.result.primaryKey);
      cursor.result.continue();
    };
  }
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = () => reject(transaction.error);
  });
}
