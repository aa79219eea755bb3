"""A process that measures something for this one, in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

OUR_SPIN_COUNT = ("GOMP_SPINCOUNT", "1000")  # which the package sets when it is imported


class Peer:
    """A script that answers each line of JSON with one, as `children/lines.py` says.

    Its environment is the person's and `environment`: what this package sets for its own threads would make llama.cpp,
    whose threads meet at a barrier after every operation, two to three times slower.
    """

    def __init__(self, python: str, script: str | Path, *arguments: object, **environment: str):
        self.name = f"{python} {Path(script).name}"
        theirs = dict(variable for variable in os.environ.items() if variable != OUR_SPIN_COUNT)
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (`close` closes it)
        try:
            self._child = subprocess.Popen(
                [python, str(script), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=theirs | environment,
            )
        except OSError as error:
            raise RuntimeError(f"{python} does not run: {error.strerror}") from error

    def ask(self, **request: object) -> dict[str, Any]:
        """Raises RuntimeError, in one line, where the script says why it cannot answer, or ends."""
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._child.wait()
            raise RuntimeError(f"{self.name} ended with status {status}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        """The last line that it printed as an error, where a traceback has its message."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else "no error was printed"

    def close(self) -> None:
        """Ends the process, by the end of its input, and waits for it."""
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()
        self._errors.close()
