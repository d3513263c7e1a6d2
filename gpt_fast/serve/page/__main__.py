"""python -m gpt_fast.serve.page: the chat page for a server that asks for a token; relay.py says how."""

from gpt_fast.serve.page.relay import main

if __name__ == "__main__":
    main()
