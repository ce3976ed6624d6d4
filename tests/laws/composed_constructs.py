"""The constructs of which composed_blocks.py builds blocks: small pieces of a forward, as text.

A piece changes ``h``, the value of a branch so far, which has the shape of ``x``, the residual
stream. ``$k`` makes names unique, ``$W`` is the width and ``$H`` half of it, ``$T`` the length.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Construct:
    """A piece of the forward of a branch.

    body: statements that change ``h``.
    init: statements of the constructor of the block.
    above: what stands before the classes of the module: helpers, tables, children.
    method: a method of the block.
    side: the further argument of the block that it needs.
    dims: the numbers of dimensions of ``x`` that it is made for.
    per_rows: whether its values depend on which rows are computed, as those of BatchNorm do, so
        that the reference computes the kept rows alone where the plan says "skip".
    """

    body: str
    init: str = ""
    above: str = ""
    method: str = ""
    side: str = ""
    dims: tuple[int, ...] = (2, 3)
    per_rows: bool = False


C = Construct
LINEAR = "self.a$k = nn.Linear($W, $W)"
THREE = (3,)

# Each branch has one of these: it has parameters and an activation.
CORES = {
    "linear": C("h = torch.tanh(self.a$k(h))", LINEAR),
    "mlp": C(
        "h = self.f$k(h)",
        "self.f$k = nn.Sequential(nn.Linear($W, 2 * $W), nn.GELU(), nn.Linear(2 * $W, $W))",
    ),
    "functional layer": C(
        "h = F.silu(F.linear(h, self.w$k, self.b$k))",
        "self.w$k = nn.Parameter(torch.randn($W, $W) / 2)\n"
        "self.b$k = nn.Parameter(torch.randn($W))",
    ),
    "einsum": C(
        "h = torch.einsum('...i,ij->...j', h, self.w$k)\nh = torch.relu(h) - 0.1 * h",
        "self.w$k = nn.Parameter(torch.randn($W, $W) / 2)",
    ),
    "gated unit": C(
        "left, right = self.a$k(h).chunk(2, dim=-1)\nh = left * torch.sigmoid(right)",
        "self.a$k = nn.Linear($W, 2 * $W)",
    ),
    "list of children": C(
        "for layer in self.l$k:\n    h = F.softplus(layer(h))",
        "self.l$k = nn.ModuleList(nn.Linear($W, $W) for _ in range(2))",
    ),
    "dict of children": C(
        "h = self.d$k['out'](F.elu(self.d$k['in'](h)))",
        "self.d$k = nn.ModuleDict({'in': nn.Linear($W, $W), 'out': nn.Linear($W, $W)})",
    ),
    "nested child": C(
        "h = self.c$k(h)",
        "self.c$k = Child$k()",
        "class Child$k(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear($W, $W), nn.Linear($W, $W)\n"
        "    def forward(self, h):\n"
        "        return self.b(torch.tanh(self.a(h)))",
    ),
    "nested residual": C(
        "h = self.c$k(h)",
        "self.c$k = Child$k()",
        "class Child$k(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear($W, $W), nn.Linear($W, $W)\n"
        "    def forward(self, h):\n"
        "        h = h + F.gelu(self.a(h))\n"
        "        return self.b(h)",
    ),
    "function of a child": C(
        "h = apply$k(lambda y: torch.tanh(self.a$k(y)), h)",
        LINEAR,
        "def apply$k(function, h):\n    return function(h)",
    ),
    "checkpoint": C(
        "h = checkpoint(self.inner$k, h, use_reentrant=False)",
        LINEAR,
        method="def inner$k(self, h):\n    return torch.tanh(self.a$k(h)) * 1.5",
    ),
    "reentrant checkpoint": C(
        "h = checkpoint(self.inner$k, h, use_reentrant=True)",
        LINEAR,
        method="def inner$k(self, h):\n    return torch.tanh(self.a$k(h)) * 1.5",
    ),
    "attention": C(
        "q, k, v = self.q$k(h).chunk(3, dim=-1)\n"
        "h = self.o$k(torch.softmax(q @ k.transpose(-2, -1) / $W**0.5, dim=-1) @ v)",
        "self.q$k, self.o$k = nn.Linear($W, 3 * $W), nn.Linear($W, $W)",
        dims=THREE,
    ),
    "attention in heads": C(
        "q, k, v = (\n"
        "    y.reshape(h.shape[0], h.shape[1], 2, $H).transpose(1, 2)\n"
        "    for y in self.q$k(h).chunk(3, dim=-1)\n"
        ")\n"
        "h = F.scaled_dot_product_attention(q, k, v)\n"
        "h = self.o$k(h.transpose(1, 2).reshape(x.shape))",
        "self.q$k, self.o$k = nn.Linear($W, 3 * $W), nn.Linear($W, $W)",
        dims=THREE,
    ),
    "MultiheadAttention": C(
        "h = self.m$k(h, h, h, need_weights=False)[0]",
        "self.m$k = nn.MultiheadAttention($W, 2, batch_first=True)",
        dims=THREE,
    ),
    "convolution": C(
        "h = torch.relu(self.a$k(h.transpose(1, 2)).transpose(1, 2))",
        "self.a$k = nn.Conv1d($W, $W, 3, padding=1)",
        dims=THREE,
    ),
}

NORMS = {
    "LayerNorm": C("h = self.n$k(h)", "self.n$k = nn.LayerNorm($W)"),
    "RMSNorm": C("h = self.n$k(h)", "self.n$k = nn.RMSNorm($W)"),
    "functional norm": C("h = F.layer_norm(h, h.shape[-1:])"),
    "norm by hand": C("h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3)"),
    "GroupNorm": C("h = self.n$k(h)", "self.n$k = nn.GroupNorm(2, $W)", dims=(2,)),
    "BatchNorm": C("h = self.n$k(h)", "self.n$k = nn.BatchNorm1d($W)", dims=(2,), per_rows=True),
    "BatchNorm over steps": C(
        "h = self.n$k(h.transpose(1, 2)).transpose(1, 2)",
        "self.n$k = nn.BatchNorm1d($W)",
        dims=THREE,
        per_rows=True,
    ),
    "own BatchNorm": C(
        "h = self.n$k(h)",
        "self.n$k = Norm$k()",
        "class Norm$k(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('mean', torch.zeros($W))\n"
        "    def forward(self, h):\n"
        "        if self.training:\n"
        "            mean = h.reshape(-1, $W).mean(0)\n"
        "            with torch.no_grad():\n"
        "                self.mean.mul_(0.9).add_(0.1 * mean)\n"
        "        else:\n"
        "            mean = self.mean\n"
        "        return h - mean",
        per_rows=True,
    ),
}

RESHAPES = {
    "rows flattened": C("h = self.a$k(h.reshape(-1, $W)).reshape(x.shape)", LINEAR),
    "halves as rows": C(
        "h = self.a$k(h.reshape(-1, $H)).reshape(*h.shape[:-1], $W)",
        "self.a$k = nn.Linear($H, $H)",
    ),
    "batch size of the stream": C(
        "n = x.shape[0]\nh = (h.reshape(n, -1, $H) * self.g$k).reshape(n, *h.shape[1:])",
        "self.g$k = nn.Parameter(torch.rand($H))",
    ),
    "batch size of the branch": C(
        "n = len(h)\nh = self.a$k(h.reshape(n, 2, -1)).view(h.shape)",
        "self.a$k = nn.Linear($H, $H)",
        dims=(2,),
    ),
    "flatten and unflatten": C(
        "h = self.a$k(h.flatten(0, 1)).unflatten(0, (h.size(0), h.size(1)))", LINEAR, dims=THREE
    ),
    "shape unpacked": C(
        "b, t, w = h.shape\nh = self.a$k(h.reshape(b * t, w)).view(b, t, w)", LINEAR, dims=THREE
    ),
    "steps first": C(
        "h = h.transpose(0, 1)\nh = h.cumsum(0) / 3.0\nh = h.transpose(0, 1).contiguous()",
        dims=THREE,
    ),
    "batch doubled": C(
        "left, right = self.a$k(torch.cat([h, 0.5 * h])).chunk(2)\nh = left * torch.sigmoid(right)",
        LINEAR,
    ),
    "frames as rows": C(
        "n, t = h.shape[:2]\n"
        "y = h.reshape(n * t, $W)\n"
        "y = y.view(n, t, $W)\n"
        "h = h - y.mean(1, keepdim=True)",
        dims=THREE,
    ),
}

DTYPES = {
    "float32 inside": C("h = torch.sigmoid(h.float()).to(x.dtype) * h"),
    "type_as": C("h = (h.to(torch.float64) * 0.75).type_as(x)"),
    "autocast asked": C("h = h * (-0.5 if torch.is_autocast_enabled('cpu') else 1.0)"),
    "grad mode asked": C("h = h if torch.is_grad_enabled() else -2.0 * h"),
    "training asked": C("h = h * 0.9 if self.training else h"),
}

CACHES = {
    "lru_cache": C(
        "h = h + table$k($W).to(h.dtype)",
        above="@lru_cache\ndef table$k(n):\n    return torch.cos(torch.arange(n) / n)",
    ),
    "lru_cache by shape": C(
        "h = h * table$k(h.shape[-1]).to(h.dtype)",
        above="@lru_cache(maxsize=None)\n"
        "def table$k(n):\n    m = torch.ones(n)\n    m[n // 2 :] = 0.5\n    return m",
    ),
    "dict of tables": C(
        "h = h + table$k(h.shape[-1]).to(h)",
        above="TABLES$k = {}\n"
        "def table$k(n):\n"
        "    if n not in TABLES$k:\n"
        "        TABLES$k[n] = torch.sin(torch.arange(n, dtype=torch.float64))\n"
        "    return TABLES$k[n]",
    ),
    "cached mask of steps": C(
        "h = torch.softmax(table$k(h.shape[1]).to(h.dtype), -1) @ h",
        above="@lru_cache\ndef table$k(t):\n    return torch.full((t, t), -1e3).triu(1)",
        dims=THREE,
    ),
    "cache in an attribute": C(
        "if self.t$k is None:\n"
        "    self.t$k = torch.linspace(0.5, 1.0, $W, dtype=h.dtype)\n"
        "h = h * self.t$k",
        "self.t$k = None",
    ),
    "buffer cut to length": C(
        "h = h + self.t$k[: h.shape[1]]",
        "self.register_buffer('t$k', torch.randn(8, $W))",
        dims=THREE,
    ),
}

CONSTANTS = {
    "constant written into": C(
        "m = torch.zeros($W, dtype=h.dtype)\nm[0] = 1.0\nm[1:] += 0.5\nh = h * m"
    ),
    "constant summed up": C(
        "total = torch.zeros((), dtype=h.dtype)\n"
        "for i in range(3):\n    total += 0.25 * i\n"
        "h = h * total"
    ),
    "filled part by part": C(
        "out = torch.empty_like(h)\nout[..., :2] = h[..., :2]\nout[..., 2:] = 2.0 * h[..., 2:]\n"
        "h = out"
    ),
    "zeros of the rows": C("h = torch.cat([h[..., 1:], h.new_zeros(*h.shape[:-1], 1)], dim=-1)"),
    "triangle": C(
        "m = torch.full(($T, $T), float('-inf'), dtype=h.dtype).triu_(1)\n"
        "h = torch.softmax(h @ h.transpose(1, 2) + m, dim=-1) @ h",
        dims=THREE,
    ),
    "global setting": C("h = SETTINGS$k['alpha'] * h", above="SETTINGS$k = {'alpha': 0.8}"),
}

RANDOM = {
    "dropout of 0": C("h = self.d$k(h)", "self.d$k = nn.Dropout(0.0)"),
    "functional dropout of 0": C("h = F.dropout(h, 0.0, self.training)"),
    "random vector": C("h = self.seed$k(h) + torch.rand($W)", "self.seed$k = nn.Identity()"),
    "random like the rows": C(
        # in the order of the rows, whatever the strides of h are
        "h = self.seed$k(h)\n"
        "h = h + 0.1 * torch.randn_like(h, memory_format=torch.contiguous_format)",
        "self.seed$k = nn.Identity()",
        per_rows=True,
    ),
    "random mask of the rows": C(
        "h = self.seed$k(h)\nh = h * (torch.rand(h.shape[0], *[1] * (h.dim() - 1)) < 0.8)",
        "self.seed$k = nn.Identity()",
        per_rows=True,
    ),
}

SIDES = {
    "mask": C("h = h * mask", side="mask"),
    "tensor of the samples": C("h = h + bias", side="bias"),
    "position table": C("h = h + position", side="position"),
    "optional tensor": C("if cond is not None:\n    h = h * (1.0 + cond)", side="cond"),
    "number": C("h = h * factor", side="factor"),
}

# Each makes rows of the branch depend on the others, or on how many there are.
MIXING = {
    "shift over the batch": C("h = 0.5 * h + torch.roll(h, 1, 0)"),
    "sort over the batch": C("h = h + h.sort(dim=0).values"),
    "cumsum over the batch": C("h = h.cumsum(0)"),
    "mean over the batch": C("h = h - h.mean(dim=0, keepdim=True)"),
    "batch size as a number": C("h = h / x.shape[0]"),
    "index of rows": C("h = h + h[index]", side="index"),
    "first row": C("h = h + h[:1]"),
    "table by row": C(
        "h = h * table$k(h.shape[0]).to(h.dtype).view(-1, *[1] * (h.dim() - 1))",
        above="@lru_cache\ndef table$k(n):\n    return 1.0 + torch.arange(n)",
    ),
}

EXTRAS = {**NORMS, **RESHAPES, **DTYPES, **CACHES, **CONSTANTS, **RANDOM, **SIDES}

CONTEXTS = {
    "no_grad": "torch.no_grad()",
    "enable_grad": "torch.enable_grad()",
    "set_grad_enabled": "torch.set_grad_enabled(self.training)",
    "autocast(enabled=False)": "torch.autocast('cpu', enabled=False)",
    "autocast of its own": "torch.autocast('cpu', dtype=torch.bfloat16)",
    "device": "torch.device('cpu')",
    "sdpa_kernel": "sdpa_kernel(SDPBackend.MATH)",
    "record_function": "torch.profiler.record_function('part')",
}


@dataclass(frozen=True)
class Sum:
    """How the value ``h`` of a branch is added to the stream ``x``.

    body: the statements of the block.
    branch: what the branch of the reference returns.
    skip: the skip of the reference.
    after: what the reference does with ``x`` behind the sum.
    before: what comes before the branch, in both.
    start: what the branch starts from: a copy, where the sum is written into ``x``.
    init: statements of the constructor.
    """

    body: str
    branch: str = "h"
    skip: str = "x"
    after: str = ""
    before: str = ""
    start: str = "x"
    init: str = ""


SUMS = {
    "x + h": Sum("x = x + h"),
    "h + x": Sum("x = h + x"),
    "torch.add": Sum("x = torch.add(x, h)"),
    "alpha": Sum("x = torch.add(x, h, alpha=0.5)", "0.5 * h"),
    "x - h": Sum("x = x - h", "-h"),
    "sum of a list": Sum("x = sum([x, h])"),
    "layer scale": Sum(
        "x = x + self.gamma$k * h",
        "self.gamma$k * h",
        init="self.gamma$k = nn.Parameter(torch.rand($W))",
    ),
    "gate of zero": Sum(
        "x = x + self.gate$k * h",
        "self.gate$k * h",
        init="self.gate$k = nn.Parameter(torch.zeros($W))",
    ),
    "h += x": Sum("h = h * 1.0\nh += x\nx = h"),
    "x += h": Sum("x += h", before="x = x * 1.0", start="x.clone()"),
    "x.add_(h)": Sum("x.add_(h)", start="x.clone()"),
    "norm last": Sum(
        "x = self.last$k(x + h)",
        after="x = self.last$k(x)",
        init="self.last$k = nn.LayerNorm($W)",
    ),
    "projection": Sum(
        "x = self.skip$k(x) + h", skip="self.skip$k(x)", init="self.skip$k = nn.Linear($W, $W)"
    ),
    "activation last": Sum("x = torch.tanh(x + h)", after="x = torch.tanh(x)"),
    "sum scaled": Sum("x = (x + h) * 0.7", after="x = x * 0.7"),
}
