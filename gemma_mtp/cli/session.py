"""The session that `gemma-mtp run` holds on a terminal when it is given no prompt."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.cli.writing import end_line, write_stream
from gemma_mtp.errors import PromptError

if TYPE_CHECKING:
    from gemma_mtp import Generation, Stream
    from gemma_mtp.model import Prompt

COMMANDS = """\
  /clear   start afresh        /help   this text
  /exit    leave (or Ctrl-D)   Ctrl-C  stop a generation"""


class Continuation:
    """One growing text: what is typed is appended to it, and the model goes on from all of it."""

    help = f"Type some text and press Enter: the model goes on from everything above.\n{COMMANDS}"

    def __init__(self) -> None:
        self.text = ""

    def prompt(self, line: str) -> "Prompt":
        return f"{self.text}\n{line}" if self.text else line

    def keep(self, line: str, generation: "Generation") -> None:
        self.text = f"{self.prompt(line)}{generation.text}"

    def clear(self) -> None:
        self.text = ""


class Conversation:
    """Turns of a user and the model, after the system's words if there are any."""

    help = f"Type a message and press Enter.\n{COMMANDS}\n  /system TEXT  what the system turn says; no TEXT: none"

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[dict[str, Any]] = []

    def prompt(self, line: str) -> "Prompt":
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": line}]

    def keep(self, line: str, generation: "Generation") -> None:
        self.turns += [{"role": "user", "content": line}, generation.message()]

    def clear(self) -> None:
        self.turns = []


class Session:
    """Reads lines from the terminal and writes what the model says to them."""

    def __init__(
        self, name: str, talk: Continuation | Conversation, ask: "Callable[[Prompt], Stream]", show_drafts: bool
    ) -> None:
        self.name, self.talk, self.ask, self.show_drafts = name, talk, ask, show_drafts

    def run(self) -> None:
        """Reads and answers lines until /exit or the end of the input."""
        history = open_history()
        print(f"{self.name}. /help tells what there is; Ctrl-D leaves.")
        try:
            while self.turn():
                pass
        finally:
            history.save()

    def turn(self) -> bool:
        """One line read and answered; False once the session is over."""
        try:
            line = input("> ")
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:  # an unfinished line is dropped, as in a shell
            print()
            return True
        match line.strip():
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/help":
                print(self.talk.help)
            case "/clear":
                self.talk.clear()
            case command if isinstance(self.talk, Conversation) and command.split()[0] == "/system":
                self.talk.system = command.removeprefix("/system").strip() or None
            case command if command.startswith("/"):
                print(f"There is no command {command}; /help lists those there are.")
            case _:
                self.answer(line)
        return True

    def answer(self, line: str) -> None:
        try:
            generation = write_stream(self.ask(self.talk.prompt(line)), self.show_drafts)
        except PromptError as error:  # the text outgrew the context, say: it can be cleared and the session go on
            print(f"{error} /clear starts afresh.", file=sys.stderr)
            return
        self.talk.keep(line, generation)
        print()
        print(end_line(generation), file=sys.stderr)


class History:
    """Lines of earlier sessions for the arrow keys, kept in the user's state directory."""

    def __init__(self, path: Path) -> None:
        import readline

        self.readline = readline
        self.path = path
        try:
            if path.exists():
                readline.read_history_file(path)
        except OSError as error:
            print(f"Earlier lines cannot be read from {path}: {error.strerror}.", file=sys.stderr)

    def save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.readline.set_history_length(1000)
            self.readline.write_history_file(self.path)
        except OSError as error:
            print(f"The lines of this session cannot be kept in {self.path}: {error.strerror}.", file=sys.stderr)


def open_history() -> History:
    import platformdirs

    return History(platformdirs.user_state_path("gemma-mtp") / "history")
