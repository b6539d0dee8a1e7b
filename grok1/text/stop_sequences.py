"""Stop texts: cutting a stream of text before the first of several given texts."""

from __future__ import annotations

from collections.abc import Sequence

from grok1.errors import RequestError


class StopMatcher:
    """Cuts a stream of text before the first of several stop texts, which may span several pieces.

    The first is the one that ends first; of several that end together, the longest. The result does not depend on how
    the text is split into pieces.

        matcher = StopMatcher(["\\n\\n", "END"])
        text, stop = matcher.push("Yes.\\n")  # "Yes.", None: the newline may be the start of a stop text
        text, stop = matcher.push("\\nNo.")  # "", "\\n\\n"

    Args:
        stops: the stop texts; without any, all text passes through.

    Raises:
        RequestError: if a stop text is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise RequestError("stop text is empty, expected at least one character; omit it")
        # Longest first: of several that end together, the longest is found first.
        self._stops = [_Stop(text) for text in sorted(set(stops), key=lambda text: (-len(text), text))]
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of the text.

        Returns:
            The text that cannot be part of a stop text, and the stop text once one is complete. After that, further
            text is ignored.
        """
        if self._found is not None:
            return "", self._found
        text, start = self._held + text, len(self._held)
        for end in range(start + 1, len(text) + 1):
            complete = [stop for stop in self._stops if stop.advance(text[end - 1])]
            if complete:
                self._held = ""
                self._found = complete[0].text
                return text[: end - len(self._found)], self._found
        certain = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """End the stream: returns the text held back, which could have started a stop text."""
        held, self._held = self._held, ""
        return held


class _Stop:
    """Matches one stop text by the algorithm of Knuth, Morris and Pratt (1977); `matched` characters match so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _border[n]: length of the longest proper prefix of text[:n] that is also its suffix.
        self._border = [0, 0]
        for end in range(1, len(text)):
            length = self._border[end]
            while length and text[end] != text[length]:
                length = self._border[length]
            self._border.append(length + (text[end] == text[length]))

    def advance(self, character: str) -> bool:
        """Take the next character; returns whether it completes the stop text."""
        while self.matched and character != self.text[self.matched]:
            self.matched = self._border[self.matched]
        self.matched += character == self.text[self.matched]
        return self.matched == len(self.text)
