"""Chat templates: Jinja in pieces that fit together more often than not."""

from __future__ import annotations

from hypothesis import strategies as st

_NAMES = st.sampled_from(
    [
        *("messages", "message", "message.content", "message['role']", "messages[0].content", "bos_token", "eos_token"),
        *("tools", "loop.index0", "add_generation_prompt", "n", "ns.x", "raise_exception", "strftime_now", "missing"),
        *("messages.__class__.__mro__", "namespace", "range", "cycler", "joiner", "self", "''.join"),
    ]
)
_LITERALS = st.sampled_from(
    [
        *("1", "-1", "0", "99999", "10**9", "1e308", "'a'", "'<|im_end|>\\n'", "'x' * 99", "true", "none", "[]", "{}"),
        *("'%s' % 1", "'{0.__class__}'.format(1)", "(1, 2)", "'\\ud800'", "'\\x00'", '"\ufdd0"'),
    ]
)
_FILTERS = st.sampled_from(
    [
        *(
            "trim",
            "upper",
            "tojson",
            "length",
            "first",
            "last",
            "join",
            "list",
            "int",
            "safe",
            "e",
            "reverse",
            "sum",
            "map",
        ),
        *("batch(2)", "indent(4)", "center(9)", "replace('a', 'b')", "attr('__class__')", "format(1)", "nothing"),
    ]
)
EXPRESSIONS = st.recursive(
    _NAMES | _LITERALS,
    lambda inner: st.one_of(
        st.builds("{}|{}".format, inner, _FILTERS),
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["+", "~", "*", "/", "%", "==", "in", "and", "<"]), inner
        ),
        st.builds("{}({})".format, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
    ),
    max_leaves=4,
)
_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_PIECES = st.one_of(
    st.sampled_from(["a", "\n", " ", "<|im_start|>", "<|im_end|>\n", "{{", "}}", "{%", "%}", "{#", "{% raw %}", "\0"]),
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% set n = {} %}}".format, EXPRESSIONS),
    st.just("{{ raise_exception('no') }}"),
    st.just("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    st.just(f"{{% for message in messages %}}{_TURN}{{% endfor %}}"),
)
TEMPLATES = st.recursive(
    st.lists(_PIECES, max_size=4).map("".join),
    lambda inner: st.one_of(
        st.builds("{{% for message in messages %}}{}{{% endfor %}}".format, inner),
        st.builds("{{% for n in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% macro m(n) %}}{}{{% endmacro %}}{{{{ m({}) }}}}".format, inner, EXPRESSIONS),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, _FILTERS, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{}{}".format, inner, inner),
    ),
    max_leaves=4,
)
"""Templates; a few of them write what a template should."""
