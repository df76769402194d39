"""Parsing 10,000 paths: lamina against Lark's LALR parser with the same grammar.

Both make one object with the parts of each text: Lark through a transformer that runs while it
parses, its fastest way. lamina makes Python's view of the parts when they are asked for, so that is
timed too. Goal: at most 1.5 µs per path from Python, its object included. What looking paths up
costs among 10,000 modules or sites stands in a second table.
"""

import statistics
from functools import partial
from typing import Any, NamedTuple

from lark import Lark, Token, Transformer

from lamina._core import ModuleTree, Path, SiteIndex
from measure import arguments, compare, ratios, show, timed

COUNT = 10_000
SHAPES = [
    "model.transformer.h[{layer}].output",
    "model.transformer.h[{layer}].mlp.output[-1]",
    "model.model.layers[{layer}].self_attn.output[0][{token}]",
    "model.model.layers.{layer}.self_attn.q_proj.input",
    "model.layers[{layer}].output[-4:]",
    "model.layers[:{layer}:2].mlp.experts[0,7].output@1[ 0, -1 ]",
    "model.bert.encoder.layer[{layer}].output.output",
    "model.layers[{layer}].output[0].grad[-1]",
]
GRAMMAR = r"""
path: "model" _step* _DOT PORT call? _element* (position | GRAD (position | _LEFT INDEX _RIGHT)?)?
_step: _DOT (NAME | NUMBER) | _LEFT INDEX _RIGHT | span | several
_element: _DOT (NAME | NUMBER) | _LEFT INDEX _RIGHT
call: _AT (NUMBER | call_span)
call_span: NUMBER? COLON NUMBER?
position: span | several
span: _LEFT INDEX? COLON INDEX? (COLON INDEX?)? _RIGHT
several: _LEFT INDEX _COMMA (INDEX (_COMMA INDEX)* _COMMA?)? _RIGHT
_DOT: "."
_AT: "@"
_LEFT: /\[\s*/
_RIGHT: /\s*\]/
_COMMA: /\s*,\s*/
COLON: /\s*:\s*/
GRAD.4: /\.grad(?![^.\[@])/
PORT.3: /(input|output)(?![^.\[@])(?!.*\.(input|output)(?![^.\[@]))/
NUMBER.2: /(0|[1-9][0-9]*)(?![^.\[@:])/
INDEX: /-?[1-9][0-9]*|0/
NAME: /[^.\[\]@\s]+/
"""


class Parts(NamedTuple):
    """A path as Lark's transformer makes it."""

    steps: tuple[object, ...]
    port: str
    call: object
    elements: tuple[object, ...]
    grad: bool
    position: object


class Transform(Transformer[Token, Any]):
    """Makes the parts while Lark parses."""

    def NUMBER(self, token: str) -> int:  # noqa: N802 - Lark's name for a terminal's callback
        """Return a number."""
        return int(token)

    INDEX = NUMBER

    def span(self, children: list[Any]) -> slice:
        """Return a slice in its shortest form."""
        bounds: list[int | None] = [None]
        for child in children:
            if isinstance(child, int):
                bounds[-1] = child
            else:
                bounds.append(None)
        start, stop, step = (*bounds, None)[:3]
        return slice(start or None, stop, None if step == 1 else step)

    call_span = span

    def several(self, children: list[int]) -> list[int]:
        """Return a list."""
        return children

    def call(self, children: list[Any]) -> tuple[str, object]:
        """Return a call, told apart from an element."""
        return ("call", children[0])

    def position(self, children: list[Any]) -> object:
        """Return a slice or a list."""
        return children[0]

    def path(self, children: list[Any]) -> Parts:
        """Return all of them."""
        at = next(at for at, child in enumerate(children) if getattr(child, "type", "") == "PORT")
        steps, port, rest = children[:at], children[at], children[at + 1 :]
        call: object = 0
        grad, position = False, None
        elements: list[object] = []
        for child in rest:
            if isinstance(child, tuple):
                call = child[1]
            elif getattr(child, "type", "") == "GRAD":
                grad = True
            elif isinstance(child, slice | list) or grad:
                position = child
            else:
                elements.append(child)
        return Parts(tuple(steps), port, call, tuple(elements), grad, position)


def parts(path: Path) -> Parts:
    """Return Python's view of all parts of a path."""
    return Parts(path.steps, path.port, path.call, path.elements, path.grad, path.position)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    rounds = options.rounds or (15 if options.full else 5)
    shapes = len(SHAPES)
    texts = [SHAPES[at % shapes].format(layer=at % 97, token=at % 31) for at in range(COUNT)]
    lark = Lark(GRAMMAR, start="path", parser="lalr", transformer=Transform())
    assert [parts(Path(text)) for text in texts] == [lark.parse(text) for text in texts]
    cases = {
        "lamina": timed(lambda: [Path(text) for text in texts]),
        "lamina, all parts read": timed(lambda: [parts(Path(text)) for text in texts]),
        "Lark, LALR": timed(lambda: [lark.parse(text) for text in texts]),
    }
    seconds = compare(cases, rounds)
    show(
        "Parsing paths",
        ["", "µs per path", "lamina is faster by"],
        [
            [
                name,
                f"{statistics.median(taken) / COUNT * 1e6:.2f}",
                "" if name == "lamina" else f"{ratios(seconds, 'lamina', name):.1f}×",
            ]
            for name, taken in seconds.items()
        ],
        f"{COUNT} paths of {shapes} shapes, medians of {rounds} rounds. Goal ≤ 1.5 µs.",
    )
    lookup(rounds)


def lookup(rounds: int) -> None:
    """Measure expansion and lookup among 10,000."""
    modules = [f"model.layers.{at // 10}.part{at % 10}" for at in range(COUNT)]
    sites = [f"model.model.layers[{at // 10}].part{at % 10}.output" for at in range(COUNT)]
    tree, index = ModuleTree(modules), SiteIndex(sites)
    pattern, target = "model.layers[:].part3.output[-1]", "model.layers[777].part3.output[-1]"
    index.find(pattern)
    actions = {
        "index of the sites made": partial(SiteIndex, sites),
        "made, first site found by its text": lambda: SiteIndex(sites).find(sites[7773]),
        "made, first pattern found (1,000 sites)": lambda: SiteIndex(sites).find(pattern),
        "site found by its text": partial(index.find, sites[7773]),
        "target found by its short form": partial(index.find, target),
        "pattern found (1,000 sites)": partial(index.find, pattern),
        "tree of the modules made": partial(ModuleTree, modules),
        "pattern expanded (1,000 paths)": partial(tree.expand, Path(pattern)),
    }
    seconds = compare({name: timed(action) for name, action in actions.items()}, rounds * 3)
    show(
        "Looking paths up among 10,000",
        ["", "µs"],
        [[name, f"{statistics.median(taken) * 1e6:.1f}"] for name, taken in seconds.items()],
        f"medians of {rounds * 3} rounds.",
    )


if __name__ == "__main__":
    main()
