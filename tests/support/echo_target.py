"""A target for tests of processes: in a module that imports little, so that its process starts fast."""

import os

from gpt_fast.bench.sample import Unavailable


class Echo:
    def __init__(self, value):
        if value == "absent":
            raise Unavailable("echo: install an echo")
        if value == "broken":
            raise OSError("two\nlines")
        self.value = value

    def get(self, more):
        return self.value + more

    def fail(self):
        raise Unavailable("not this one")

    def end(self):
        os._exit(7)
