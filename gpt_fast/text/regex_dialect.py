r"""A regular expression as clients write it (Python's `re`), respelled for the grammar compiler (Rust's regex-syntax).

The two differ in little things, some of them silently: `\w` holds other letters, `[` inside a class opens a class,
`\<` is a word's beginning, `{,3}` is text. Whatever the respelled expression matches, `re.fullmatch` matches by the
original; of characters that only one side puts into \d, \w or \s, fewer are let through. What cannot be respelled
is a RegexError that says what to write instead.
"""

from __future__ import annotations

import re
import warnings

# What to write for a class, and for what its complement leaves out. Python's \w has all of isalnum(), Rust's has marks
# too: ASCII is in both, and what is in neither is outside both.
CLASSES = {"d": "0-9", "w": "a-zA-Z0-9_", "s": r" \t\n\r\f\v"}
OUTSIDE = {"d": r"\p{Nd}", "w": r"_\p{L}\p{N}\p{M}", "s": r"\s\x1c-\x1f\x85\p{Z}\x{feff}"}
TOKEN = re.compile(
    r"\\[0-7]{3}|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|\[\^?\]?|\(\?[^)]?[^)]?|\{,\d+\}|.", re.S
)
LOOKS = ("(?=", "(?!", "(?<=", "(?<!")
LITERALS = {"a": r"\x07", "b": r"\x08"}  # of letters, what they mean in a class
PLAIN = "tnrfv"


class RegexError(ValueError):
    """An expression that the grammar compiler cannot have, in one line."""


def respelled(pattern: str) -> str:
    """The pattern for the compiler, which matches whole answers: its outer ^ and $ are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that "[[" may one day be a set
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RegexError(f"not a regular expression: {error} (allowed Python's)") from None
    tokens = TOKEN.findall(pattern)
    if tokens[:1] in (["^"], [r"\A"]):
        tokens = tokens[1:]
    if tokens[-1:] in (["$"], [r"\Z"]):
        tokens = tokens[:-1]
    out: list[str] = []
    inside, quantified = "", False
    for token in tokens:
        if inside:
            piece, inside = class_piece(token, inside)
        elif token.startswith("["):
            inside = "[^" if token.startswith("[^") else "["
            piece = inside + (r"\]" if token.endswith("]") else "")
        elif token in ("?", "+") and quantified:
            if token == "+":
                raise RegexError("possessive quantifiers (as in a++) are not supported, leave the second + out")
            piece = ""  # a lazy one matches the same whole texts
        else:
            piece = outer_piece(token)
        quantified = not inside and not quantified and (token in ("*", "+", "?") or ends_repeat(token, out))
        out.append(piece)
    return "".join(out)


def with_plain_classes(pattern: str) -> str:
    """A JSON schema's pattern whose \\d, \\w and \\s let through what every validator agrees on; else as it is."""
    out: list[str] = []
    inside = ""
    for token in TOKEN.findall(pattern):
        is_class = len(token) == 2 and token[0] == "\\" and token[1].lower() in CLASSES
        if inside:
            piece, after = class_piece(token, inside)
            out.append(piece if is_class else token)
            inside = after
        else:
            inside = ("[^" if token.startswith("[^") else "[") if token.startswith("[") else ""
            out.append(outer_piece(token) if is_class else token)
    return "".join(out)


def ends_repeat(token: str, before: list[str]) -> bool:
    """Whether a token is the } of a repetition such as {2,3}."""
    return token.startswith("{,") or (token == "}" and bool(re.search(r"\{\d+(,\d*)?$", "".join(before[-24:]))))


def outer_piece(token: str) -> str:
    if token.startswith("{,"):
        return "{0" + token[1:]
    if token.startswith("(?"):
        if token.startswith(LOOKS):
            raise RegexError(f"look-ahead and look-behind ({token}...) are not supported, write the pattern without")
        if token.startswith(("(?(", "(?>", "(?#", "(?P=")):
            raise RegexError(f"{token}... is not supported, write the pattern without")
        return token
    if token in "^$":
        raise RegexError(f"{token} inside the pattern is not supported, the whole answer is matched anyway")
    if len(token) < 2 or token[0] != "\\":
        return token
    name = token[1]
    if name in CLASSES:
        return f"[{CLASSES[name]}]"
    if name.lower() in CLASSES:
        return f"[^{OUTSIDE[name.lower()]}]"
    if name in "bBAZ":
        raise RegexError(f"{token} is not supported, the whole answer is matched anyway")
    if name in "123456789" and len(token) == 2:
        raise RegexError(f"back-references ({token}) are not supported")
    return escaped(token)


def class_piece(token: str, inside: str) -> tuple[str, str]:
    """A token inside [...]: its spelling, and whether the class goes on."""
    negated = inside == "[^"
    if token == "]":
        return "]", ""
    if token[0] == "\\" and len(token) > 1:
        name = token[1]
        if name in CLASSES:
            return (OUTSIDE if negated else CLASSES)[name], inside
        if name.lower() in CLASSES:
            kind = name.lower()
            return f"[^{CLASSES[kind] if negated else OUTSIDE[kind]}]", inside
        return (LITERALS[name] if name in LITERALS else escaped(token)), inside
    # A token may hold several characters that mean something outside a class only.
    return "".join("\\" + each if each in "[&~" else each for each in token.replace("--", r"-\-")), inside


def escaped(token: str) -> str:
    r"""An escape that means one character: \x41, \u0041, \101, \n, \<."""
    name = token[1]
    if len(token) > 2:
        code = int(token[1:], 8) if name in "01234567" else int(token[2:], 16)
        return rf"\x{{{code:x}}}"
    if name == "0":
        return r"\x00"
    if name in PLAIN:
        return token
    if name in LITERALS:
        return LITERALS[name]
    return re.escape(name) if name.isascii() and not name.isalnum() and name not in "<> \n" else name
