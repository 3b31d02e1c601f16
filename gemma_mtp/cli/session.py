"""The session that `gemma-mtp run` holds on a terminal when it is given no prompt."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.cli.run import end_line, write_stream
from gemma_mtp.errors import PromptError

if TYPE_CHECKING:
    from gemma_mtp import Model, SamplingParams

HELP = """\
Type some text and press Enter: the model goes on from everything above.
  /clear   start afresh        /help   this text
  /exit    leave (or Ctrl-D)   Ctrl-C  stop a generation"""


class Session:
    """One growing text: what is typed is appended to it, and the model goes on from all of it."""

    def __init__(self, model: "Model", params: "SamplingParams", draft: str | int, show_drafts: bool) -> None:
        self.model = model
        self.params = params
        self.draft = draft
        self.show_drafts = show_drafts
        self.text = ""

    def run(self) -> None:
        """Reads and answers lines until /exit or the end of the input."""
        history = open_history()
        print(f"{self.model.name}. /help tells what there is; Ctrl-D leaves.")
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
                print(HELP)
            case "/clear":
                self.text = ""
            case command if command.startswith("/"):
                print(f"There is no command {command}; /help lists those there are.")
            case _:
                self.answer(line)
        return True

    def answer(self, line: str) -> None:
        text = f"{self.text}\n{line}" if self.text else line
        try:
            generation = write_stream(self.model, text, self.params, self.draft, self.show_drafts)
        except PromptError as error:  # the text outgrew the context, say: it can be cleared and the session go on
            print(f"{error} /clear starts afresh.", file=sys.stderr)
            return
        self.text = text + generation.text
        print()
        print(end_line(generation), file=sys.stderr)


class History:
    """Lines of earlier sessions for the arrow keys, kept in the user's state directory."""

    def __init__(self, path: Path) -> None:
        import readline

        self.readline = readline
        self.path = path
        if path.exists():
            readline.read_history_file(path)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.readline.set_history_length(1000)
        self.readline.write_history_file(self.path)


def open_history() -> History:
    import platformdirs

    return History(platformdirs.user_state_path("gemma-mtp") / "history")
