#!/usr/bin/env python3
"""gpt-fast doctor, by the name that the Makefile and the pages give it."""

from gpt_fast.torchserve.doctor import main

if __name__ == "__main__":
    main()
