"""The private names of other packages that this project touches: all of them here, each with what is expected of it.

Such a name may change in any release. Where an upgrade breaks one, its check says which; where the code comes to touch
another, the scan says where, and it belongs on this list (or, better, a public name in its place).
"""

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("tspin", "analysis", "tspin_analysis", "experiments")
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}  # of named tuples and of os: private in looks alone
LISTED: set[str] = set()


def private(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Put a private name on the list; the test below it checks what the code expects of it."""
    LISTED.add(name)
    return lambda test: test


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


@private("_get_grad_norm")
def test_grad_norm():
    """Trainer calls it before each step of the optimizer, and logs what it returns: ours refuses what is not finite."""
    from transformers import Trainer

    assert parameters(Trainer._get_grad_norm) == ["self", "model", "grad_norm"]
    assert "grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)" in inspect.getsource(Trainer)


@private("_save_checkpoint")
def test_save_checkpoint():
    """Trainer calls it where a checkpoint is due, and it writes one folder into args.output_dir."""
    from transformers import Trainer

    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert "self._save_checkpoint(model, trial)" in inspect.getsource(Trainer)
    source = inspect.getsource(Trainer._save_checkpoint)
    assert "args.output_dir" in source or "_get_output_dir" in source


@private("_load_from_checkpoint")
def test_load_from_checkpoint():
    """Trainer calls it with a kept state's folder before it goes on; of adapters, they alone are written there."""
    from transformers import PreTrainedModel, Trainer

    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer)
    assert "only adapter weights will be saved" in inspect.getsource(PreTrainedModel.save_pretrained)


@private("_tr_loss")
def test_tr_loss():
    """The loss summed since the last log, a tensor: kept with a training's state, added again when it goes on."""
    from transformers import Trainer

    source = inspect.getsource(Trainer)
    assert "self._tr_loss = torch.tensor(0.0" in source and "self._tr_loss += tr_loss_step" in source


@private("_last_lr")
def test_last_lr():
    """What a schedule's get_last_lr() returns: Trainer logs it as the rate, before the schedule's first step too."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule._last_lr == [0.5]
    schedule._last_lr = [0.25]
    assert schedule.get_last_lr() == [0.25]


@private("_globalstep_last_logged")
def test_globalstep_last_logged():
    """The step of the last log, by which the logged loss is a mean."""
    from transformers import Trainer

    source = inspect.getsource(Trainer)
    assert "self._globalstep_last_logged = self.state.global_step" in source
    assert "(self.state.global_step - self._globalstep_last_logged)" in source


@private("_issue_warnings_after_load")
def test_issue_warnings_after_load():
    """Trainer calls it with the keys that a checkpoint lacks or has too many: ours refuses them."""
    from transformers import Trainer

    assert parameters(Trainer._issue_warnings_after_load) == ["self", "load_result"]
    source = inspect.getsource(Trainer._issue_warnings_after_load)
    assert "missing_keys" in source and "unexpected_keys" in source


@private("_attn_implementation")
def test_attn_implementation():
    """What attention a model was loaded with, in its config; there is a public method to set it, and none to ask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@private("_can_set_attn_implementation")
@private("_supports_sdpa")
def test_attention_can_be_chosen():
    """Whether a model looks its attention up at each call, and whether it has a form by PyTorch's function."""
    from transformers import BloomForCausalLM, FalconForCausalLM, LlamaForCausalLM

    assert LlamaForCausalLM._can_set_attn_implementation() and LlamaForCausalLM._supports_sdpa
    assert not FalconForCausalLM._can_set_attn_implementation() and FalconForCausalLM._supports_sdpa
    assert not BloomForCausalLM._supports_sdpa


@private("_C")
def test_tensor_subclasses_step_aside():
    """torch._C.DisableTorchFunctionSubclass: what a subclass's __torch_function__ goes on with; PyTorch's own do so."""
    import torch

    from tspin.segments import Segments

    mask = Segments.of([[2, 1]], torch.device("cpu"))
    assert type(mask + 1) is torch.Tensor and (mask + 1).shape == (1, 1, 1, 1)


@private("_is_stateful")
def test_is_stateful():
    """Whether a model keeps a state of past tokens beside keys and values, in its cache or in itself."""
    from transformers import LlamaForCausalLM, MambaForCausalLM, RecurrentGemmaForCausalLM

    assert not LlamaForCausalLM._is_stateful
    assert MambaForCausalLM._is_stateful and RecurrentGemmaForCausalLM._is_stateful


@private("_set_sync_gradients")
def test_set_sync_gradients():
    """Says whether the next backward pass is a step's last."""
    from accelerate.state import GradientState

    state = GradientState()
    for value in (False, True):
        state._set_sync_gradients(value)
        assert state.sync_gradients is value


@private("_shared_state")
def test_shared_state():
    """What all of Accelerate's states are, by name: the kind of distribution can be changed there."""
    from accelerate import PartialState

    state = PartialState()
    assert state.__dict__ is PartialState._shared_state
    assert PartialState._shared_state["distributed_type"] == state.distributed_type


@private("_loglikelihood_tokens")
def test_loglikelihood_tokens():
    """Where every multiple-choice request of lm-eval's Hugging Face backend ends up."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM

    assert parameters(HFLM._loglikelihood_tokens) == ["self", "requests", "disable_tqdm", "override_bs"]
    assert "self._loglikelihood_tokens(" in inspect.getsource(TemplateLM.loglikelihood)


@private("_model_generate")
def test_model_generate():
    """Where every generation of lm-eval's Hugging Face backend ends up; it returns contexts and continuations."""
    from lm_eval.models.huggingface import HFLM

    assert parameters(HFLM._model_generate) == ["self", "context", "max_length", "stop", "generation_kwargs"]
    source = inspect.getsource(HFLM.generate_until)
    assert "self._model_generate(" in source and "attention_mask=attn_masks" in source


@private("lm_eval.tasks._index.Entry")
def test_entry():
    """What TaskManager.task_index holds."""
    from lm_eval.tasks._index import Entry

    assert {field.name for field in fields(Entry)} >= {"name", "kind", "yaml_path", "cfg"}


@private("huggingface_hub.utils._http.default_client_factory")
def test_default_client_factory():
    """The client that set_client_factory replaces: ours is that one with a limit on waiting."""
    from huggingface_hub.utils._http import default_client_factory

    with default_client_factory() as client:
        assert client.event_hooks["request"]


@private("_fingerprint")
def test_fingerprint():
    """What `datasets` identifies rows by."""
    from datasets import Dataset

    one, two = (Dataset.from_dict({"a": [value]}) for value in "xy")
    assert isinstance(one._fingerprint, str) and one._fingerprint != two._fingerprint


def test_names_that_are_set_from_outside():
    """Public, but nothing would say so if they were renamed: a value would be set and never read."""
    from accelerate.data_loader import BatchSamplerShard
    from accelerate.utils import FullyShardedDataParallelPlugin

    shard = BatchSamplerShard([[0]], num_processes=2, process_index=1, even_batches=False)
    assert (shard.num_processes, shard.process_index, shard.even_batches) == (2, 1, False)
    assert "mixed_precision_policy" in {field.name for field in fields(FullyShardedDataParallelPlugin)}


def test_the_list_is_complete():
    touched = defaultdict(list)
    for path in sources():
        for name, line in touched_in(path):
            touched[name].append(f"{path.relative_to(ROOT)}:{line}")
    missing = {name: places for name, places in touched.items() if name not in LISTED}
    assert not missing, f"private names of other packages that are not on the list: {missing}"
    assert LISTED <= touched.keys(), f"no longer touched: {LISTED - touched.keys()}"


def test_the_scan_sees_imports_attributes_and_words(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(
        "from a._b import c\nimport a\na._d.e = getattr(a, '_f').__doc__ + a.g()._asdict() + setattr(a, '_h', 1)"
    )
    assert {name for name, _ in touched_in(path)} == {"a._b.c", "_d", "_f", "_h"}


@cache
def sources() -> list[Path]:
    return sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))


def touched_in(path: Path) -> Iterator[tuple[str, int]]:
    """Private names of other packages in a file, and their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in OURS:
            for alias in node.names:
                if any(map(is_private, [*node.module.split("."), alias.name])):
                    yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined_here():
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            for constant in node.args[1:2]:
                if isinstance(constant, ast.Constant) and is_private(str(constant.value)):
                    yield str(constant.value), node.lineno
        elif isinstance(node, ast.ClassDef):
            inherited = private_names_of_bases(path, node)
            for inner in ast.walk(node):
                if getattr(inner, "attr", getattr(inner, "name", None)) in inherited:
                    yield getattr(inner, "attr", None) or inner.name, inner.lineno


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in DOCUMENTED


@cache
def defined_here() -> set[str]:
    """Private names that this project defines: functions, classes, attributes that are assigned."""
    return set().union(*(defined_in(ast.parse(path.read_text(encoding="utf-8"))) for path in sources()))


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that some code defines."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(is_private, names))


def private_names_of_bases(path: Path, node: ast.ClassDef) -> set[str]:
    """Private names that a class inherits from classes of other packages: its own may be an override or a collision."""
    if not node.bases:
        return set()
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = getattr(module, node.name, None)
    names: set[str] = set()
    for base in found.__mro__ if isinstance(found, type) else ():
        if base.__module__.split(".")[0] in OURS or base.__module__ in ("builtins", "typing"):
            continue
        names |= set(filter(is_private, vars(base)))
        try:
            names |= defined_in(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError):  # a class of C, or made at run time
            continue
    return names
