"""Memory of one process in each phase of a step, counted tensor by tensor from what the trunk keeps.

Checked against the tensors that are really alive: tests/parity/test_plan_memory.py. Elements of one token in one layer
(D hidden, F inside the MLP, A = heads x head_dim and KV = kv_heads x head_dim as dealt to this rank, b bytes each):

    norm       2 D          normalised, weighted; and 4 / b D more where it is computed in fp32 from something else
    attention  2 A + 2 KV   queries, keys, values (a prefix's are its own anyway) and the output; one A more where
                            ranks exchange heads, as the output is kept in both layouts; 4 / b a head for log-sum-exps
    layer      2 D          its input, and the sum after attention
    MLP        4 F          gate, its activation, up, their product; in the backward pass 2 F more
"""

from __future__ import annotations

from math import ceil, log2

from longrl.plan.devices import Device
from longrl.plan.shapes import ModelShape
from longrl.plan.work import BACKWARD_PATCHES, HEAD_CHUNK, STREAM_TOKENS, Memory, Setup, Work


class Tally:
    """The sizes that the phases are put together from, in bytes of one process."""

    def __init__(self, shape: ModelShape, work: Work, setup: Setup, device: Device) -> None:
        self.shape, self.work, self.setup, self.device = shape, work, setup, device
        self.b = setup.compute_bytes
        self.tokens = ceil(work.prompt_tokens / setup.sp)
        self.kv_heads = max(shape.kv_heads, setup.ulysses) / setup.ulysses
        copies = max(1, setup.ulysses // shape.kv_heads)
        self.heads = self.kv_heads * ceil(shape.heads / shape.kv_heads / copies)
        # in an exchange a rank's tokens become all tokens of its heads: the same number of elements, but for padding
        self.a = self.heads * setup.ulysses * shape.head_dim
        self.kv = self.kv_heads * setup.ulysses * shape.head_dim
        self.adapters = shape.lora_parameters(setup.lora_rank, setup.lora_targets) if setup.lora_rank else 0
        # an adapter keeps its input in its own type; where that is the layer's, all that read it share it
        self.copy = max(4, setup.weight_bytes) / self.b if setup.compute_bytes == setup.weight_bytes else 1.0
        self.rope = self.tokens * self.b * (6 if shape.vision else 2) * shape.head_dim

    def norm(self, *readers: str) -> float:
        """Elements of a token that a norm keeps, with what the products that read it do."""
        d, wide = self.shape.width, 0 if self.b == 4 else 4 / self.b
        if not self.adapters:
            return (2 + wide) * d
        return (wide + self.inputs(*readers)) * d

    def inputs(self, *readers: str) -> float:
        """Copies of an input that adapters keep; the frozen products beside them keep none."""
        count = len(set(readers) & set(self.setup.lora_targets))
        return count * self.copy if self.copy != 1 else min(count, 1)

    @property
    def lse(self) -> float:
        return 4 / self.b * self.heads * self.setup.ulysses

    @property
    def saved(self) -> float:
        """Elements of a token that one layer keeps for its backward, without its input, keys, values and MLP."""
        attention = 2 * self.a + self.lse + (self.a if self.setup.sp > 1 else 0)
        if self.adapters and self.copy != 1:
            attention += self.inputs("o_proj") * self.a
        rope = 2 * self.shape.head_dim if self.shape.vision else 0
        norms = self.norm("q_proj", "k_proj", "v_proj") + self.norm("gate_proj", "up_proj")
        return norms + attention + self.stream + rope

    @property
    def stream(self) -> int:
        """Of the hidden states before a norm: where they are not fp32, a norm keeps a copy that is, and not them."""
        return self.shape.width if self.b == 4 else 0

    def saved_mlp(self, tokens: int) -> float:
        """The same of its MLP, of all tokens; tiles keep nothing, they are run again."""
        return 0 if self.tile(tokens) < tokens else self.inside * tokens

    @property
    def inside(self) -> float:
        """Elements of a token inside the MLP; a frozen product does not keep its input."""
        product = self.inputs("down_proj") if self.adapters else 1
        return (3 + product) * self.shape.intermediate

    def tile(self, tokens: int) -> int:
        return min(tokens, self.setup.mlp_tile_tokens or tokens)

    def again(self, tokens: int) -> float:
        """Bytes that one layer keeps when it is run again for its backward, above its input."""
        return self.b * (tokens * (self.saved + 2 * self.kv) + self.saved_mlp(tokens))

    def backward(self, tokens: int) -> float:
        """Bytes while one layer is run backward, above what it has kept: gradients, first of the MLP, then, when what
        that had kept is gone, of the attention."""
        d, f = self.shape.width, self.shape.intermediate
        passing = 2 + (self.copy if self.adapters and self.copy != 1 else 0)
        of_mlp = self.tile(tokens) * (self.inside + passing * f) - self.saved_mlp(tokens)
        expanded = 4 * self.a if self.device.is_cpu and self.heads > self.kv_heads else 0
        of_attention = tokens * (2 * self.a + 2 * self.kv + expanded + self.messages) - self.saved_mlp(tokens)
        if self.setup.ring > 1:  # keys and values come by, the next on their way, and three shares of gradients in fp32
            of_attention += tokens * 4 / self.b * self.a + self.far * (2 + 3 * 4 / self.b)
        return self.b * (tokens * d + max(of_mlp, of_attention))

    @property
    def messages(self) -> float:
        """Elements of a token in what ranks send each other around attention and what they get."""
        return 2 * (self.a + 2 * self.kv) if self.setup.ulysses > 1 else 0

    @property
    def far(self) -> float:
        """Elements of one layer's keys and values of the prefix."""
        return self.prefix_kv / self.shape.layers / self.b

    def forward(self, tokens: int) -> float:
        """Bytes while one layer is run forward without keeping anything, above its input."""
        d, a = self.shape.width, self.a
        tiled = 2 * d if self.tile(tokens) < tokens else 0  # tiles, and all of them as one
        wide = 2 * self.copy if self.adapters and self.copy != 1 else 0  # what an adapter makes, and the sum with it
        mlp = tokens * (2 * d + tiled) + self.tile(tokens) * (3 + wide) * self.shape.intermediate
        attention = tokens * (d + 4 * a + 2 * self.kv + (2 * a if self.device.is_cpu else 0) + self.messages)
        if self.setup.ring > 1:  # keys and values as they come by, partial results in fp32
            attention += tokens * 3 * 4 / self.b * a + 2 * self.far
        return self.b * max(mlp, attention)

    def prefix_layer(self, graph: bool) -> dict[str, float]:
        """While the prefix runs forward; with a graph that keeps all, nothing comes and goes that is not counted so."""
        if graph and self.setup.recompute == "none":
            return {}
        inputs = 0 if graph else self.tokens * self.b * self.shape.width
        return {"one layer": self.forward(self.tokens) + self.rope + inputs}

    @property
    def prefix_kv(self) -> float:
        per_token = 2 * self.kv_heads * self.shape.head_dim * self.b
        return self.shape.layers * per_token * ceil(self.work.prompt_tokens / self.setup.ring)

    def kept(self) -> tuple[dict[str, float], float]:
        """What a prefix keeps for its backward beside its keys and values: on the device, and on the host."""
        setup, shape = self.setup, self.shape
        token = self.tokens * self.b
        if setup.recompute == "none":
            # the last layer is left at its keys and values
            layers, last = shape.layers - 1, self.stream + self.norm("k_proj", "v_proj")
            whole = layers * (token * (self.stream + self.saved) + self.b * self.saved_mlp(self.tokens)) + token * last
            return {"saved activations": whole + self.rope}, 0.0
        inputs = token * shape.width * shape.layers
        kept: dict[str, float] = {"layer inputs": inputs}
        if setup.offload:
            kept["layer inputs"] = token * shape.width * 2  # one is used, one on its way
        if setup.recompute == "keep_attention":
            # of a ring the result for each part
            kept["kept attention"] = token * (self.a + self.lse) * (shape.layers - 1) * setup.ring
        return kept, inputs if setup.offload else 0.0

    def steady(self) -> dict[str, float]:
        """What is there at any time. The tower is on every rank, in full."""
        shape, setup, work = self.shape, self.setup, self.work
        share, weight, wide = setup.sp if setup.sharded else 1, setup.weight_bytes, max(4, setup.weight_bytes)
        stored = weight * (shape.trunk_parameters / share + shape.tower_parameters)
        parts = {"weights": stored + wide * self.adapters / share}
        if work.reference and not self.adapters and not setup.offload_reference:
            parts["reference weights"] = stored
        if work.trains:
            language = wide * self.adapters if self.adapters else weight * shape.trunk_parameters
            parts["gradients"] = setup.language * language / share + weight * setup.encoder_parameters
            parts["optimizer"] = 2 * parts["gradients"]
        return parts

    def pinned(self, size: float) -> float:
        """Of a tensor of so many bytes: PyTorch takes pinned memory in powers of two."""
        return size if self.device.is_cpu or not size else 2.0 ** ceil(log2(size))

    @property
    def host_reference(self) -> float:
        """Of a reference whose weights come to the device a layer at a time; biases and norms are too few to count. The
        tower is not pinned."""
        shape, setup = self.shape, self.setup
        if not setup.offload_reference:
            return 0.0
        each = setup.weight_bytes / (setup.sp if setup.sharded else 1)
        layer = sum(self.pinned(each * rows * columns) for rows, columns in shape.linears.values())
        root = self.pinned(each * shape.vocabulary * shape.width) * (1 if shape.tied else 2)
        return shape.layers * layer + root + setup.weight_bytes * shape.tower_parameters

    def gathered(self, blocks: int, always: bool = False) -> dict[str, float]:
        """Weights that are copied or whole for a pass: the root's, and of so many layers."""
        if not (self.setup.copies_weights or always):
            return {}
        shape = self.shape
        return {"gathered weights": self.b * (shape.root_parameters + blocks * shape.layer_parameters)}

    def reduced(self) -> dict[str, float]:
        """Gradients of two layers before they are dealt out."""
        if not self.setup.copies_weights or self.adapters:
            return {}
        return {"gradients being reduced": 2 * 4 * self.shape.layer_parameters}

    @property
    def media(self) -> dict[str, float]:
        """Embeddings that are leaves, as the encoder learns: at most all tokens are. With what is added to them behind
        the first layers."""
        levels = self.shape.vision.levels if self.shape.vision else 0
        rows = self.tokens * self.b * self.shape.width * (1 + levels)
        return {"media embeddings": rows} if self.setup.encoder_parameters else {}

    def encoder(self) -> dict[str, float]:
        """While the encoder runs again over some patches, and backward: the gradients of the embeddings, and what it
        keeps of each patch. A tower that does not learn keeps nothing. Its blocks: norms and the sums they read, one
        product for queries, keys and values, queries and keys turned, the output in two layouts, and the MLP."""
        vision, b = self.shape.vision, self.setup.weight_bytes
        assert vision is not None
        w, f, merged = vision.width, vision.intermediate, vision.merge**2
        summed = w if b == 4 else 4 / b * w
        pixels = 3 * vision.temporal * vision.patch**2
        projector = 2 * w + summed + 2 * w + 2 * self.shape.width / merged
        learns = self.setup.encoder_parameters > self.shape.projector_parameters
        block = 2 * (2 * w + summed) + 7 * w + 4 * f
        kept = pixels + projector + (vision.depth * block + 2 * f + w if learns else 0)
        patches = max(BACKWARD_PATCHES // max(1, self.work.grid_patches), 1) * self.work.grid_patches
        return {
            "gradients of media": self.media["media embeddings"],
            "encoder": b * (patches or BACKWARD_PATCHES) * kept,
        }

    @property
    def micro_batch(self) -> int:
        """Tokens of this rank in one suffix micro-batch."""
        work = self.work
        rows = min(work.group_size, max(1, STREAM_TOKENS // work.response_tokens))
        return ceil(rows * work.response_tokens / self.setup.sp)

    def suffix(self) -> dict[str, float]:
        """What one micro-batch of streams takes. Its logits are made again in the backward pass, a chunk at a time,
        when the layers have kept all that they keep; one layer is run backward when the logits are gone."""
        shape, tokens = self.shape, self.micro_batch
        row = tokens * self.b
        one = self.backward(tokens)
        if self.setup.recompute == "none":
            layers = shape.layers * (row * self.stream + self.again(tokens))
        else:
            layers, one = shape.layers * row * shape.width, one + self.again(tokens)
        if self.setup.recompute == "keep_attention":  # of both parts, as wide as they are summed
            layers += shape.layers * row * (self.a + self.lse) * (1 + self.wide / self.b)
        one += row * (12 if self.device.is_cpu else 4) * self.a  # folded and unfolded, two partial results
        one += self.prefix_kv / shape.layers  # the gradients of one layer's keys and values before they are added up
        logits = 4 * max(4, self.b) * min(HEAD_CHUNK, tokens) * shape.vocabulary
        rest = {"logits": logits} if logits > one else {"one suffix layer": one}
        return {"suffix micro-batch": layers, **rest}

    @property
    def wide(self) -> int:
        """Bytes of an element where streams attend to their own tokens: see parallel/attend.py, wider."""
        return 8 if self.device.is_cpu and self.b == 4 else self.b

    @property
    def vllm_weights(self) -> float:
        """With the tower, which not all models have there."""
        assert self.setup.vllm is not None
        shape = self.shape
        head = shape.vocabulary * shape.width if shape.tied else 0  # which it has of its own: see vllm_weights.py
        parameters = shape.trunk_parameters + head + shape.tower_parameters
        return self.setup.vllm.weight_bytes * parameters / self.setup.sp

    @property
    def vllm_needs(self) -> float:
        """For its weights and one response."""
        assert self.setup.vllm is not None
        kv = 2 * self.shape.layers * self.kv_heads * self.shape.head_dim * self.setup.vllm.weight_bytes
        return self.vllm_weights + kv * (self.work.prompt_tokens + self.work.response_tokens)

    @property
    def vllm_lacks(self) -> bool:
        """Whether that has no room in what vLLM takes of a GPU."""
        vllm, device = self.setup.vllm, self.device
        return vllm is not None and not device.is_cpu and vllm.share * device.memory_bytes < self.vllm_needs

    @property
    def in_flight(self) -> int:
        """Prompts whose keys and values training holds at a time."""
        return self.setup.prompts_in_flight if self.work.rollout and not self.setup.vllm else 1

    def decode(self, streams_each: int) -> dict[str, float]:
        """streams_each: after one prefix."""
        shape, work = self.shape, self.work
        streams = min(streams_each * self.setup.prompts_in_flight, work.max_streams)
        own = 2 * shape.layers * streams * work.response_tokens * self.kv_heads * shape.head_dim * self.wide
        logits = 4 * 8 * streams * shape.vocabulary
        return {"decode buffers": own + logits}


def plan_memory(shape: ModelShape, work: Work, setup: Setup, device: Device) -> Memory:
    """Bytes of each part in each phase."""
    t = Tally(shape, work, setup, device)
    steady, kept, host = t.steady(), dict[str, float](), 0.0
    if work.trains:
        kept, host = t.kept()
    one_prompt = {"prefix KV": t.prefix_kv, **kept} | (t.media if work.trains else {})
    here = steady | {part: size * t.in_flight for part, size in one_prompt.items()}
    phases = {"prefill": here | t.prefix_layer(work.trains) | t.gathered(2)}
    if setup.vllm:  # draws all responses before the first prefix
        phases["decode"] = dict(steady)
    elif work.rollout:
        streams = max(work.group_size + work.greedy_streams, work.shuffled_streams)
        phases["decode"] = here | t.decode(streams) | t.gathered(shape.layers)
    if work.evaluated_streams:
        prefixes = {"prefix KV": setup.prompts_in_flight * t.prefix_kv}
        phases["evaluation"] = steady | prefixes | t.decode(work.evaluated_streams) | t.gathered(shape.layers)
    if work.reference:
        reference = {"reference's prefix KV": t.prefix_kv} | t.prefix_layer(False)
        phases["reference"] = here | reference | t.gathered(2, always=setup.offload_reference)
    if work.trains:
        # a single micro-batch fills the gradients of the keys and values while it frees what it had kept; those of
        # several are added up in fp32
        several = t.micro_batch * setup.sp < work.suffix_tokens
        grads = {"prefix gKV": t.prefix_kv * (max(4, t.b) / t.b if several else 1)}
        phases["suffix"] = here | (grads if several else {}) | t.suffix() | t.gathered(2) | t.reduced()
        one = {"one layer": t.backward(t.tokens) + (0 if setup.recompute == "none" else t.again(t.tokens) + t.rope)}
        phases["prefix backward"] = here | grads | one | t.gathered(2) | t.reduced()
        if setup.encoder_parameters:
            # the prefix is gone; those of others are not
            waiting = {part: size * (t.in_flight - 1) for part, size in one_prompt.items()}
            phases["encoder"] = steady | waiting | {"media embeddings": here["media embeddings"]} | t.encoder()
        # AdamW goes through all parameters at once on a GPU, one after another on the CPU
        phases["optimizer"] = steady | ({} if device.is_cpu else {"AdamW's denominators": steady["gradients"]})
    inputs = shape.layers * t.pinned(host / shape.layers) * t.in_flight
    on_host = {"layer inputs": inputs, "reference weights": t.host_reference}
    if (vllm := setup.vllm) and not device.is_cpu:
        for name in ("decode",) if vllm.sleeps else phases:
            phases[name] |= {"vLLM": vllm.share * device.memory_bytes}
        if vllm.sleeps and work.evaluated_streams:  # it has been given the new weights by then
            phases["evaluation"] |= {"vLLM's weights": t.vllm_weights}
        on_host["vLLM's weights"] = t.vllm_weights if vllm.sleeps else 0.0
    return Memory(
        phases={name: {part: int(size) for part, size in parts.items() if size} for name, parts in phases.items()},
        host={part: int(size) for part, size in on_host.items() if size},
    )
