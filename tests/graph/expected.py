"""What may be cut from the networks of ``nets.py``, worked out by hand.

A place is written ``tensor:dimension`` and ``w`` write, ``r`` read, ``n`` norm or ``o`` other, with ``*width`` where a
unit takes more than one position. ``FROZEN``: written channels that stay, besides those of the last layer, and why.
"""

from __future__ import annotations

GROUPS: dict[str, dict[str, tuple[int, str]]] = {
    "conv_bn": {
        "a": (8, "a.weight:0w bn.weight:0n bn.bias:0n b.weight:1r bn.running_mean:0n bn.running_var:0n"),
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "mlp": {
        "a": (10, "a.weight:0w a.bias:0o b.weight:1r"),
        "b": (7, "b.weight:0w c.weight:1r"),
    },
    "residual": {
        "stem": (
            8,
            "stem.weight:0w stem.bias:0o one.weight:1r two.weight:0w two.bias:0o bn2.weight:0n bn2.bias:0n "
            "fc.weight:1r bn2.running_mean:0n bn2.running_var:0n",
        ),
        "one": (
            6,
            "one.weight:0w one.bias:0o bn1.weight:0n bn1.bias:0n two.weight:1r bn1.running_mean:0n bn1.running_var:0n",
        ),
    },
    "concat": {
        "a": (4, "a.weight:0w a.bias:0o bn.weight:0n bn.bias:0n c.weight:1r bn.running_mean:0n bn.running_var:0n"),
        "b": (6, "b.weight:0w b.bias:0o bn.weight:0n bn.bias:0n c.weight:1r bn.running_mean:0n bn.running_var:0n"),
        "c": (3, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "depthwise": {
        "a": (
            6,
            "a.weight:0w a.bias:0o d.weight:0w*2 d.bias:0o*2 bn.weight:0n*2 bn.bias:0n*2 b.weight:1r*2 "
            "bn.running_mean:0n*2 bn.running_var:0n*2",
        ),
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "grouped": {
        "a": (4, "a.weight:0w*2 a.bias:0o*2 g.weight:0w*3 g.bias:0o*3 b.weight:1r*3"),
        "b": (5, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "transposed": {
        "a": (6, "a.weight:0w a.bias:0o up.weight:0r"),
        "up": (4, "up.weight:1w*2 up.bias:0o*2 g.weight:0w*2 g.bias:0o*3 b.weight:1r*3"),
    },
    "squeeze_excite": {
        "a": (8, "a.weight:0w a.bias:0o down.weight:1r up.weight:0w up.bias:0o b.weight:1r"),
        "down": (4, "down.weight:0w down.bias:0o up.weight:1r"),
        "b": (5, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "group_norm": {
        "a": (4, "a.weight:0w*3 a.bias:0o*3 gn.weight:0n*3 gn.bias:0n*3 b.weight:1r*3"),
        "b": (5, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "layer_norm": {
        "embed": (
            8,
            "scale:0o position:2o embed.weight:0w embed.bias:0o norm.weight:0n norm.bias:0n up.weight:1r "
            "down.weight:0w down.bias:0o head.weight:1r",
        ),
        "up": (10, "up.weight:0w up.bias:0o down.weight:1r"),
    },
    "shuffle": {
        "a": (8, "a.weight:0w a.bias:0o b.weight:1r"),
        "b": (4, "b.weight:0w*2 b.bias:0o*2 c.weight:1r*2"),
        "c": (6, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "pixel_shuffle": {
        "a": (3, "a.weight:0w*4 a.bias:0o*4 b.weight:1r"),
        "b": (5, "b.weight:0w b.bias:0o c.weight:1r*4"),
        "c": (6, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "rms_norm": {
        "embed": (8, "embed.weight:0w embed.bias:0o norm.weight:0n up.weight:1r down.weight:0w head.weight:1r"),
        "up": (10, "up.weight:0w down.weight:1r"),
    },
    "open_heads": {
        "embed": (12, "embed.weight:0w embed.bias:0o qkv.weight:1r"),
        "qkv": (3, "qkv.weight:0w*12 qkv.bias:0o*12 proj.weight:1r*4"),
        "proj": (7, "proj.weight:0w proj.bias:0o head.weight:1r"),
    },
    "counted_heads": {
        "q": (
            3,
            "bias:0o q.weight:0w*5 q.bias:0o*5 k.weight:0w*5 k.bias:0o*5 v.weight:0w*5 v.bias:0o*5 proj.weight:1r*5",
        ),
        "proj": (7, "proj.weight:0w proj.bias:0o head.weight:1r"),
    },
    "fused_heads": {
        "qkv": (3, "qkv.weight:0w*12 qkv.bias:0o*12 proj.weight:1r*4"),
    },
    "heads_by_hand": {
        "q": (
            4,
            "table:1o q.weight:0w*3 q.bias:0o*3 k.weight:0w*3 k.bias:0o*3 v.weight:0w*5 v.bias:0o*5 proj.weight:1r*5",
        ),
    },
    "fixed_heads": {
        "up": (7, "up.weight:0w up.bias:0o head.weight:1r"),
    },
    "width_from_input": {
        "proj": (12, "proj.weight:0w proj.bias:0o up.weight:1r"),
        "up": (7, "up.weight:0w up.bias:0o head.weight:1r"),
    },
    "c2f": {
        "a": (4, "a.weight:0w*2 a.bias:0o*2 m1.weight:1r m2.weight:0w m2.bias:0o b.weight:1r*3"),
        "m1": (6, "m1.weight:0w m1.bias:0o m2.weight:1r"),
        "b": (5, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "flatten": {
        "a": (6, "a.weight:0w a.bias:0o fc.weight:1r*4"),
        "fc": (8, "fc.weight:0w fc.bias:0o out.weight:1r"),
    },
    "constant_slice": {
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "constant_split": {
        "b": (6, "b.weight:0w b.bias:0o c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "constant_view": {
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "constant_scale": {
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "second_output": {
        "a": (8, "a.weight:0w a.bias:0o b.weight:1r"),
        "c": (4, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "constant_add": {
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "buffer_add": {
        "a": (8, "a.weight:0w a.bias:0o b.weight:1r shift:1o"),
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "in_place": {
        "a": (8, "a.weight:0w a.bias:0o b.weight:0w b.weight:1r b.bias:0o c.weight:1r"),
        "c": (4, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "in_place_fresh": {
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "shared": {
        "a": (8, "a.weight:0w a.bias:0o s.weight:0w s.weight:1r s.bias:0o b.weight:1r"),
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "functional": {
        "w1": (8, "w1:0w w2:1r"),
        "w2": (6, "w2:0w fc.weight:1r"),
    },
    "train_head": {
        "a": (8, "a.weight:0w a.bias:0o b.weight:1r aux.weight:1r"),
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "tied": {
        "out": (5, "out.weight:0w out.bias:0o fc.weight:1r"),
    },
    "by_hand": {
        "w": (4, "w:1w b.weight:1r"),
        "b": (7, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "parametrized": {
        "b": (5, "b.weight:0w b.bias:0o c.weight:1r"),
        "c": (4, "c.weight:0w c.bias:0o fc.weight:1r"),
    },
    "unknown": {
        "d": (6, "d.weight:0w d.bias:0o e.weight:1r"),
        "e": (4, "e.weight:0w e.bias:0o fc.weight:1r"),
    },
    "one_d": {
        "a": (8, "a.weight:0w a.bias:0o bn.weight:0n bn.bias:0n b.weight:1r bn.running_mean:0n bn.running_var:0n"),
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
        "fc": (
            5,
            "bnl.weight:0n bnl.bias:0n fc.weight:0w fc.bias:0o out.weight:1r bnl.running_mean:0n bnl.running_var:0n",
        ),
    },
    "three_d": {
        "a": (6, "a.weight:0w a.bias:0o bn.weight:0n bn.bias:0n b.weight:1r bn.running_mean:0n bn.running_var:0n"),
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "prelu": {
        "a": (8, "a.weight:0w a.bias:0o act.weight:0o b.weight:1r"),
        "b": (4, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
    "glu": {
        "a": (4, "a.weight:0w*2 a.bias:0o*2 b.weight:1r"),
        "b": (6, "b.weight:0w b.bias:0o fc.weight:1r"),
    },
}

FROZEN: dict[str, dict[str, tuple[int, str]]] = {
    "fixed_heads": {
        "qkv": (36, "contracted by a product of activations"),
    },
    "width_from_input": {
        "qkv": (36, "the code can't run with fewer channels"),
    },
    "constant_slice": {
        "a": (8, "sliced at positions that the code holds"),
    },
    "constant_split": {
        "a": (8, "the code can't run with fewer channels"),
    },
    "constant_view": {
        "a": (16, "the code can't run with fewer channels"),
    },
    "constant_scale": {
        "a": (8, "cut and masked differ at the input of b"),
    },
    "second_output": {
        "b": (6, "an output of the network"),
        "fc": (2, "an output of the network"),
    },
    "constant_add": {
        "a": (8, "add with a tensor whose channels stay"),
    },
    "in_place_fresh": {
        "a": (8, "copy with a tensor whose channels stay"),
    },
    "tied": {
        "a": (10, "a parameter used as read and as write"),
        "t": (4, "a parameter used as write and as read"),
    },
    "by_hand": {
        "a": (10, "read by a product that is neither a convolution nor a linear layer"),
    },
    "parametrized": {
        "a": (8, "a layer whose weight is no plain parameter of the model"),
        "w": (6, "a layer whose weight is no plain parameter of the model"),
    },
    "unknown": {
        "a": (8, "softmax over channels"),
        "b": (8, "mean over channels"),
        "c": (8, "no rule for aten.cummax"),
    },
}
