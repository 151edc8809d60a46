"""Whether a chat template wants a message's content as one string or as a list of parts, as vLLM finds out.

vLLM looks at the template's syntax tree: where a loop runs over the content of a message, the template wants
parts (`renderers/hf.py`, `_detect_content_format`). It goes by names and has no idea of scopes; nor has this.
"""

from collections.abc import Iterator

from jinja2 import nodes


def wants_parts(template: nodes.Template) -> bool:
    """Whether a loop of the template runs over the content of a message."""
    messages = _names_of_messages(template)
    in_macros: set[int] = set()
    for macro in template.find_all(nodes.Macro):
        loops = list(macro.find_all(nodes.For))
        in_macros |= {id(loop) for loop in loops}
        contents = _parameters_with_content(template, macro, messages)
        if any(isinstance(loop.iter, nodes.Name) and loop.iter.name in contents for loop in loops):
            return True
    return any(
        _is_content(loop.iter, messages)
        or (id(loop) not in in_macros and isinstance(loop.iter, nodes.Name) and loop.iter.name == "content")
        for loop in template.find_all(nodes.For)
    )


def _names_of_messages(template: nodes.Template) -> set[str]:
    """The names that loops give to single messages."""
    lists = {"messages"}
    assigned = [(a.target, a.node) for a in template.find_all(nodes.Assign)]
    while found := {
        target.name
        for target, value in assigned
        if isinstance(target, nodes.Name) and target.name not in lists and _is_one_of(value, lists)
    }:
        lists |= found
    return {
        loop.target.name
        for loop in template.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _is_one_of(loop.iter, lists)
    }


def _parameters_with_content(template: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """The parameters of a macro that some call passes a message's content."""
    names = [argument.name for argument in macro.args]
    passed = {
        name: value
        for call in template.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name
        for name, value in _arguments(call, names)
        if _is_content(value, messages)
    }
    return passed.keys() & set(names)


def _arguments(call: nodes.Call, names: list[str]) -> Iterator[tuple[str, nodes.Node]]:
    yield from zip(names, call.args, strict=False)
    yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _is_one_of(node: nodes.Node | None, names: set[str]) -> bool:
    """The variable itself, or what filters, tests and slices make of it."""
    inner = _unwrapped(node)
    return isinstance(inner, nodes.Name) and inner.ctx == "load" and inner.name in names


def _is_content(node: nodes.Node | None, messages: set[str]) -> bool:
    """`message.content` or `message["content"]`, or what filters, tests and slices make of it."""
    match _unwrapped(node):
        case nodes.Getattr(node=nodes.Name(ctx="load", name=name), attr="content"):
            return name in messages
        case nodes.Getitem(node=nodes.Name(ctx="load", name=name), arg=nodes.Const(value="content")):
            return name in messages
    return False


def _unwrapped(node: nodes.Node | None) -> nodes.Node | None:
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node
