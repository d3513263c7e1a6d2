"""Which form of a message's content a chat template takes: a string, or OpenAI's list of parts.

A template for pictures walks over the parts of `message.content`; given a string it drops the user's text without a
word. So the template's own syntax decides, as in vLLM (detect_content_format): a loop over a message's content, or a
filter that takes its items, means parts. A template that asks whether content `is string` takes both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jinja2 import nodes

ContentFormat = Literal["string", "parts", "both"]

ITEM_FILTERS = ("selectattr", "rejectattr", "map", "groupby")


def content_format(syntax: nodes.Template) -> ContentFormat:
    """syntax: the parsed template."""
    messages = aliases(syntax, {"messages"}, key=None)
    loops = [loop for loop in syntax.find_all(nodes.For) if leads_to(loop.iter, messages, key=None)]
    items = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    message = aliases(syntax, items | indexed(syntax, messages), key=None)
    contents = aliases(syntax, set(), key="content", of=message)

    def is_content(node: nodes.Node | None) -> bool:
        return leads_to(node, message, key="content") or leads_to(node, contents, key=None)

    walks = any(is_content(loop.iter) for loop in syntax.find_all(nodes.For))
    takes = any(each.name in ITEM_FILTERS and is_content(each.node) for each in syntax.find_all(nodes.Filter))
    asks = any(test.name == "string" and is_content(test.node) for test in syntax.find_all(nodes.Test))
    if not (walks or takes or any(is_content(node) for node in texts_of_items(syntax))):
        return "string"
    return "both" if asks else "parts"


def aliases(syntax: nodes.Template, names: set[str], *, key: str | None, of: set[str] | None = None) -> set[str]:
    """The names, and every variable that is set to one of them or to a slice or filtering of it, at any remove.

    key, of: begin with the variables that are set to this key of one of these names.
    """
    found = set(names)
    for target, value in assignments(syntax):
        if key is not None and leads_to(value, of or set(), key=key):
            found.add(target)
    while True:
        more = {target for target, value in assignments(syntax) if leads_to(value, found, key=None)} - found
        if not more:
            return found
        found |= more


def indexed(syntax: nodes.Template, messages: set[str]) -> set[str]:
    """Variables that are set to one message: `{% set message = messages[0] %}`."""
    return {
        target
        for target, value in assignments(syntax)
        if isinstance(value, nodes.Getitem) and leads_to(value.node, messages, key=None)
    }


def texts_of_items(syntax: nodes.Template) -> Iterator[nodes.Node]:
    """Every x of which the template reads `x[0].text`."""
    pairs = [(each, each.node) for each in syntax.find_all(nodes.Getattr)]
    pairs += [(each, each.node) for each in syntax.find_all(nodes.Getitem)]  # type: ignore[misc]
    for each, item in pairs:
        if is_key(each, "text") and isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const):
            yield item.node


def assignments(syntax: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for each in syntax.find_all(nodes.Assign):
        if isinstance(each.target, nodes.Name):
            yield each.target.name, each.node


def leads_to(node: nodes.Node | None, names: set[str], *, key: str | None) -> bool:
    """Whether an expression is one of the variables (or their key), through filters, tests, choices and slices."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return leads_to(node.node, names, key=key)
    if isinstance(node, nodes.CondExpr):
        return leads_to(node.expr1, names, key=key) or leads_to(node.expr2, names, key=key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return leads_to(node.node, names, key=key)
    if key is None:
        return isinstance(node, nodes.Name) and node.name in names
    return is_key(node, key) and is_message(node.node, names)  # type: ignore[union-attr]


def is_key(node: nodes.Node | None, key: str) -> bool:
    """Whether an expression reads this key of something: `x.key` or `x["key"]`."""
    if isinstance(node, nodes.Getattr):
        return node.attr == key
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == key


def is_message(node: nodes.Node, names: set[str]) -> bool:
    """One of the variables, or an item of the conversation itself: `messages[0]`."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.node, nodes.Name) and node.node.name == "messages"
    return isinstance(node, nodes.Name) and node.name in names
