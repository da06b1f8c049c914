"""Load a built kernel package where no fastnce can be imported, compare it with float64, and print the errors as JSON.

python -I -S alone.py VARIANT NAME PATH ...    # PATH: folders of torch and triton
"""

import importlib.util
import json
import sys
from types import SimpleNamespace


class NoFastnce:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastnce":
            raise ImportError("the package must not import fastnce")


sys.meta_path.insert(0, NoFastnce())
variant, name, *paths = sys.argv[1:]
sys.path += paths

import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(name, f"{variant}/__init__.py")
sys.modules[name] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

IMAGES, PATCHES, T = 2, 12, 0.2


def reference(queries, keys):
    """InfoNCE by its definition, (rows,)."""
    queries, keys = (x.unflatten(0, (IMAGES, PATCHES)) for x in (queries, keys))
    logits = queries @ keys.transpose(1, 2) / T
    return (logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)).flatten()


def project(feature_map, ids, mlp):
    """Sample, apply the MLP, divide by the length."""
    rows = feature_map.flatten(2).transpose(1, 2)[:, ids].flatten(0, 1)
    weight1, bias1, weight2, bias2 = mlp
    rows = (rows @ weight1.T + bias1).relu() @ weight2.T + bias2
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-7)


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def compare(ours, exact, *tensors):
    """The largest relative errors of a result and of the gradients of its sum."""
    wide = [x.double().requires_grad_() for x in tensors]
    narrow = [x.requires_grad_() for x in tensors]
    results = ours(*narrow), exact(*wide)
    gradients = [torch.autograd.grad(r.sum(), x) for r, x in zip(results, (narrow, wide), strict=True)]
    return [error(*results), *map(error, *gradients)]


torch.manual_seed(0)
rows = torch.nn.functional.normalize(torch.randn(2, IMAGES * PATCHES, 24), dim=2)
queries, keys = rows[0].clone(), rows[1].clone()
maps = torch.randn(IMAGES, 5, 6, 4)
ids = package.sample_patch_ids(24, PATCHES)
mlp = [torch.randn(size) for size in ((16, 5), (16,), (16, 16), (16,))]
kernels = {"implementation": "triton"}


def chain(feature_map, *mlp):
    (rows,) = package.project_patches([feature_map], [ids], [mlp], **kernels)
    return package.patch_nce(rows, keys[:, :16], images=IMAGES, temperature=T, reduction="none", **kernels)


def exact_chain(feature_map, *mlp):
    return reference(project(feature_map, ids, mlp), keys[:, :16].double())


found = {
    "loss": compare(
        lambda q, k: package.patch_nce(
            q, k, images=IMAGES, temperature=T, reduction="none", detach_keys=False, **kernels
        ),
        reference,
        queries,
        keys,
    ),
    "chain": compare(chain, exact_chain, maps, *mlp),
}
options = SimpleNamespace(nce_T=T, batch_size=IMAGES, nce_includes_all_negatives_from_minibatch=False)
module = SimpleNamespace(opt=options)
exact = reference(queries.detach().double(), keys.detach().double())
found["layer"] = [error(package.layers.PatchNCELoss.forward(module, queries.detach(), keys), exact)]
namespaces = sorted(n for n in ("fastnce", name) if hasattr(getattr(torch.ops, n), "nce_forward"))
modules = sorted(module for module in sys.modules if module.split(".")[0] in ("fastnce", "kernels"))
print(json.dumps({"errors": found, "namespaces": namespaces, "modules": modules}))
