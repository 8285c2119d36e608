"""A GPT-2 of pykern as an ONNX graph for onnxruntime, with the operators of its own exporters.

    ids [B, T], positions [T], lengths [B], total [1], past_{k,v}_i [B, H, S, D]  ->  logits [B, V], present_{k,v}_i

GroupQueryAttention appends T keys and values to the past in place when past and present are one buffer, and is causal.
lengths are the keys of each text after that, less one; total is their greatest number. The logits are those of the
last token.
"""

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from pykern.lm import Transformer

MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 17, 10


class _Graph:
    """Nodes and initializers of a graph under way."""

    def __init__(self, model: Transformer) -> None:
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], output: str, more_outputs=(), domain="", **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output, *more_outputs], domain=domain, **attributes))
        return output

    def constant(self, name: str, value: torch.Tensor) -> str:
        self.constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def matmul(self, x: str, layer: str) -> str:
        """x W^T, with W stored as [inputs, outputs]: the layout that MatMul packs when the session starts."""
        return self.node("MatMul", [x, self.constant(f"{layer}.weight", self.weights[f"{layer}.weight"].T)], layer)

    def norm(self, x: str, layer: str, epsilon: float) -> str:
        parts = [self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias")]
        return self.node("LayerNormalization", [x, *parts], layer, epsilon=epsilon)

    def add_and_norm(self, x: str, y: str, bias: str, layer: str, epsilon: float) -> tuple[str, str]:
        """(norm(x + y + bias), x + y + bias)"""
        inputs = [x, y, self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias"), self.weight(bias)]
        total = f"{layer}.input"
        outputs = ("", "", total)
        return self.node("SkipLayerNormalization", inputs, layer, outputs, MICROSOFT, epsilon=epsilon), total


def _inputs(model: Transformer) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Inputs and outputs of the graph."""
    config = model.config
    cache = ["B", config.n_head, config.block_size, config.head_size]
    names = [f"{part}_{i}" for i in range(config.n_layer) for part in "kv"]
    sizes = {"ids": ["B", "T"], "positions": ["T"]}
    lengths = {"lengths": ["B"], "total": [1]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in sizes.items()]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in lengths.items()]
    inputs += [helper.make_tensor_value_info(f"past_{name}", TensorProto.FLOAT, cache) for name in names]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", config.vocab_size])]
    outputs += [helper.make_tensor_value_info(f"present_{name}", TensorProto.FLOAT, cache) for name in names]
    return inputs, outputs


def gpt_onnx(model: Transformer) -> onnx.ModelProto:
    """The graph of a float32 model with learned positions, LayerNorm, tanh GELU and a tied head."""
    config, graph = model.config, _Graph(model)
    eps, heads = config.norm_epsilon, {"num_heads": config.n_head, "kv_num_heads": config.n_head}
    tokens = graph.node("Gather", [graph.weight("transformer.wte.weight"), "ids"], "tokens")
    places = graph.node("Gather", [graph.weight("transformer.wpe.weight"), "positions"], "places")
    x = graph.node("Add", [tokens, places], "x")
    y = graph.norm(x, "transformer.h.0.ln_1", eps)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        qkv = graph.matmul(y, f"{block}.attn.c_attn")
        qkv = graph.node("Add", [qkv, graph.weight(f"{block}.attn.c_attn.bias")], f"{block}.qkv")
        inputs = [qkv, "", "", f"past_k_{i}", f"past_v_{i}", "lengths", "total"]
        present = (f"present_k_{i}", f"present_v_{i}")
        y = graph.node("GroupQueryAttention", inputs, f"{block}.attention", present, MICROSOFT, **heads)
        y = graph.matmul(y, f"{block}.attn.c_proj")
        y, x = graph.add_and_norm(x, y, f"{block}.attn.c_proj.bias", f"{block}.ln_2", eps)
        y = graph.matmul(y, f"{block}.mlp.c_fc")
        y = graph.node("FastGelu", [y, graph.weight(f"{block}.mlp.c_fc.bias")], f"{block}.gelu", (), MICROSOFT)
        y = graph.matmul(y, f"{block}.mlp.c_proj")
        after = f"transformer.h.{i + 1}.ln_1" if i + 1 < config.n_layer else "transformer.ln_f"
        y, x = graph.add_and_norm(x, y, f"{block}.mlp.c_proj.bias", after, eps)
    last = graph.node("Gather", [y, graph.constant("last", torch.tensor(-1))], "last_token", axis=1)
    graph.node("Gemm", [last, "transformer.wte.weight"], "logits", transB=1)
    body = helper.make_graph(graph.nodes, "gpt", *_inputs(model), graph.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
