"""A chat answer as the decoding loop reads it, token by token."""

from __future__ import annotations

from gemma_mtp.text.chat_parser import ChatEvent, ChatParser
from gemma_mtp.text.tokenizer import Tokenizer


class ChatText:
    """Implements decoding.progress.TextStream for an answer in channels.

    `push` and `flush` return what the content gains, so that stop strings look at nothing else; `take` hands out all
    that the tokens meant. Control tokens are skipped but for the markup that the parser reads. one_call: it ends with
    its first tool call.
    """

    def __init__(self, tokenizer: Tokenizer, parser: ChatParser, one_call: bool = False) -> None:
        self._detokenizer = tokenizer.stream(skip_special=True, keep=parser.markup)
        self.parser = parser
        self.ended = False
        self._one_call = one_call
        self._events: list[list[ChatEvent]] = []  # of each token not yet taken, and at last of the flush

    def push(self, token: int) -> str:
        return self._note(self.parser.push(self._detokenizer.push([token])))

    def flush(self) -> str:
        return self._note(self.parser.push(self._detokenizer.flush()) + self.parser.flush())

    def take(self, count: int) -> list[list[ChatEvent]]:
        """What each of the next `count` tokens meant: nothing, for an end token that was not pushed."""
        taken, self._events = self._events[:count], self._events[count:]
        return taken + [[]] * (count - len(taken))

    def take_rest(self) -> list[ChatEvent]:
        """What is left after the last token, the content excepted: `flush` has returned that."""
        events, self._events = self._events, []
        return [event for of_one in events for event in of_one if event.kind != "content"]

    def _note(self, events: list[ChatEvent]) -> str:
        self._events.append(events)
        self.ended = self._one_call and any(event.kind == "tool_call" for event in events)
        return "".join(event.text for event in events if event.kind == "content")
