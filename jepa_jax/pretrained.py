"""Pretrained networks: load, encode images, predict features, export.

    model = jepa_jax.load("encoder.npz")         # or a run, or foreign weights
    features = model.encode(images)              # uint8 [B, H, W, C] -> [B, D]
    maps = model.encode(images, pool=None)       # [B, h, w, D]

or with the plain Flax module:

    module, params, preprocessing = jepa_jax.load("encoder.npz")
    patches = module.apply({"params": params}, preprocessing(images))

In code that is written with flax.nnx:

    from flax import nnx

    bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
    bridged = nnx.bridge.lazy_init(bridged, preprocessing(images))
    nnx.update(bridged, nnx.State(jax.tree.map(nnx.Param, dict(params))))
    patches = bridged(preprocessing(images))     # [B, N, D]
"""

from collections.abc import Iterator
import dataclasses
import functools
import os
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import convert, models, paths
from jepa_jax.convert import formats, hugging_face, runs, table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.models import patches
from jepa_jax.models.kernels import cpu


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """The normalisation of images that an encoder was trained with.

  Attributes:
    mean: a value a channel, on a scale of 0 to 1.
    std: a value a channel.
    image_size: (H, W) of training, pixels. Positions are computed for any
      size that the patch size divides, unless they are stored.
    dtype: of the result, float32 or float64.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: tuple[int, int]
  dtype: str = "float32"

  def __call__(self, images: Any, *, unit_range: bool = False) -> jax.Array:
    """Normalises images; the arguments are those of models.normalize_images."""
    return models.normalize_images(
        jnp.asarray(images), self.mean, self.std,
        unit_range=unit_range, dtype=self.dtype,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
  """Networks and their parameters; unpacks to (module, params, preprocessing).

  Attributes:
    module: the encoder.
    params: of the chosen encoder; `module.apply({"params": params}, x)`.
    preprocessing: from uint8 images to x.
    which: "target" or "context", the chosen one.
    networks: parameters of all networks there are: "target", "context" and
      "predictor".
    predictor: the predictor, or None where there is none.
  """

  module: models.Encoder
  params: table.Params
  preprocessing: Preprocessing
  which: str
  networks: dict[str, table.Params]
  predictor: models.Predictor | None
  _copies: dict[str, table.Params] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    height, width = self.preprocessing.image_size
    return (
      f"Pretrained({self.which} encoder: {self.module.depth} blocks of width "
      f"{self.module.width}, patches of {self.module.patch_size}; images "
      f"{height}x{width}x{len(self.preprocessing.mean)}; networks: "
      f"{', '.join(self.networks)})"
    )

  def __iter__(self) -> Iterator[Any]:
    return iter((self.module, self.params, self.preprocessing))

  def encode(
    self,
    images: Any,
    which: str | None = None,
    layers: int = 1,
    pool: str | None = "mean",
    *,
    batch_size: int = 0,
    unit_range: bool = False,
  ) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, C], uint8, or float that is normalised already. All
        local devices share them where B is a multiple of their number.
      which: "target" or "context"; None for the one that was loaded as such.
      layers: 1 for the last layer, n for the last n concatenated, each
        normalised; the paper's linear probes read 1 or 4.
      pool: "mean" over the patches, or None for all of them.
      batch_size: images a forward pass; 0 for all. The last batch is padded,
        so that nothing is compiled twice.
      unit_range: floats go from 0 to 1, and are normalised here.

    Returns:
      [B, layers * D], or [B, h, w, layers * D] without pooling; float64 of a
      network that computes in it, float32 of all others.

    Raises:
      ValueError: no such encoder, unknown pool, wrong shape or type of images.
    """
    which = which or self.which
    self._params(which)
    if pool not in ("mean", None):
      raise ValueError(f'unknown pool "{pool}"; known: "mean", None.')
    images = self._check(images)
    if batch_size:
      images = np.asarray(images)
    module = self.module
    if jax.default_backend() == "cpu":
      module = module.clone(kernels=cpu.KERNELS)
    run = functools.partial(
      _encoder(), module, self.preprocessing, layers, pool, unit_range
    )
    size, count = batch_size or len(images), len(images)
    if count in (0, size):
      return run(*self._spread(which, images))
    features = []
    for start in range(0, count, size):
      batch = images[start : start + size]
      padding = [(0, size - len(batch))] + [(0, 0)] * (images.ndim - 1)
      padded = self._spread(which, np.pad(batch, padding))
      features.append(run(*padded)[: len(batch)])
    return jnp.concatenate(features)

  def predict(
    self,
    images: Any,
    context_ids: Any,
    target_ids: Any,
    context_valid: Any | None = None,
    target_valid: Any | None = None,
    *,
    unit_range: bool = False,
  ) -> jax.Array:
    """Predicts the objective's targets of some patches from other patches.

    I-JEPA's targets are the target encoder's features, after a LayerNorm
    without parameters.

    Args:
      images: [B, H, W, C], as of encode.
      context_ids: [B, S, K] or [B, K], row-major indices of patches that the
        context encoder sees.
      target_ids: [B, M, T] or [B, T], patches to predict; each of the M blocks
        is predicted independently of the others.
      context_valid: as context_ids, bool, False for padding; or None.
      target_valid: as target_ids, bool, False for padding; or None.
      unit_range: as of encode.

    Returns:
      float32 [B, S, M, T, output width of the predictor]; S or M is 1 where
      the axis was not given.

    Raises:
      ValueError: there is no predictor or no context encoder; wrong indices.
    """
    if self.predictor is None:
      raise ValueError(
        "there is no predictor; convert with --which all, or load a run."
      )
    images = self._check(images)
    grid = models.patch_grid(*images.shape[1:3], self.module.patch_size)
    ids = []
    for name, x in (("context_ids", context_ids), ("target_ids", target_ids)):
      x = np.asarray(x)
      x = x[:, None] if x.ndim == 2 else x
      if (
        x.ndim != 3
        or not np.issubdtype(x.dtype, np.integer)
        or len(x) != len(images)
        or (x.size and not 0 <= x.min() <= x.max() < grid[0] * grid[1])
      ):
        raise ValueError(
          f"{name} have shape {x.shape}; they need to be indices in [0, "
          f"{grid[0] * grid[1]}) of shape [{len(images)}, blocks, patches]."
        )
      ids.append(x)
    valid = [
      None if v is None else jnp.asarray(v, bool).reshape(x.shape)
      for v, x in zip((context_valid, target_valid), ids)
    ]
    params = (self._params("context"), self._params("predictor"))
    return _predict(
        self.module, self.predictor, self.preprocessing, unit_range, params,
        images, *ids, *valid,
    )  # fmt: skip

  def export(
    self,
    folder: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    layers: int = 1,
    pool: str | None = "mean",
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
  ) -> None:
    """Writes the encoder as StableHLO, for a process without this project.

    To read it back, with JAX and NumPy alone:

        exported = jax.export.deserialize(
            open("folder/encoder.stablehlo", "rb").read())
        params = dict(np.load("folder/encoder.npz"))
        features = exported.call(params, images)  # uint8 [any, H, W, C]

    Args:
      folder: is made; gets encoder.stablehlo and encoder.npz.
      image_size: (H, W), pixels; None for that of training.
      layers: as of encode.
      pool: as of encode.
      platforms: that it is compiled for.

    Raises:
      ValueError: the folder has such files, or the image size does not fit.
    """
    folder = pathlib.Path(folder)
    for name in (formats.EXPORTED, formats.EXPORTED_WEIGHTS):
      if (folder / name).exists():
        raise ValueError(f"{folder / name} exists; name another folder.")
    height, width = image_size or self.preprocessing.image_size
    flat = weights_lib.flatten("encoder", self.params)
    structure = jax.tree.structure(self.params)

    def encode(flat: dict[str, jax.Array], images: jax.Array) -> jax.Array:
      params = jax.tree.unflatten(structure, [flat[key] for key in names])
      return _features(
        self.module, self.preprocessing, layers, pool, False, params, images
      )

    names = list(flat)
    (batch,) = jax.export.symbolic_shape("batch")
    channels = len(self.preprocessing.mean)
    exported = jax.export.export(jax.jit(encode), platforms=platforms)(
      {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in flat.items()},
      jax.ShapeDtypeStruct((batch, height, width, channels), jnp.uint8),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / formats.EXPORTED).write_bytes(exported.serialize())
    np.savez(
      folder / formats.EXPORTED_WEIGHTS,
      **{k: np.asarray(x) for k, x in flat.items()},
    )

  def _spread(self, which: str, images: Any) -> tuple[table.Params, Any]:
    """Parameters on every local device and images split among them."""
    devices = jax.local_devices()
    if len(devices) == 1 or len(images) % len(devices):
      return self._params(which), images
    mesh = jax.sharding.Mesh(devices, ("data",))
    place = lambda x, *axes: jax.device_put(
      x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    )
    if which not in self._copies:
      self._copies[which] = place(self.networks[which])
    return self._copies[which], place(images, "data")

  def _params(self, name: str) -> table.Params:
    if name not in self.networks:
      raise ValueError(
        f'there is no "{name}" network here; there are: '
        f"{', '.join(self.networks)}."
      )
    return self.networks[name]

  def _check(self, images: Any) -> Any:
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    channels = len(self.preprocessing.mean)
    if images.ndim != 4 or images.shape[-1] != channels:
      raise ValueError(
        f"images have shape {images.shape}; they need to be "
        f"[B, H, W, {channels}]."
      )
    patches.check_pixels(images.dtype)
    return images


def load(
  path: str | os.PathLike[str],
  which: str | None = None,
  *,
  dtype: Any = "float32",
  step: int | None = None,
  num_heads: int = 0,
  scan: bool = False,
) -> Pretrained:
  """Loads networks from a run, an export or foreign weights.

  Args:
    path: a run's workdir or workdir/checkpoints/STEP, or what jepa_jax.convert
      reads: *.npz, *.safetensors, *.pth.tar, a Hugging Face folder, or the
      name of a model on its hub, such as "facebook/ijepa_vith14_1k".
    which: encoder to choose, "target" or "context"; None for the one that is
      evaluated: the target encoder, or the context encoder where there is no
      other: of a run without a moving average, and, with a warning, of
      published Hugging Face weights and other files.
    dtype: of the computation, "float32", "bfloat16", or "float64" with JAX's
      jax_enable_x64. Parameters are float32.
    step: checkpoint of a run; None for the newest.
    num_heads: of a released checkpoint of no known size.
    scan: compiles one block instead of all, which is faster to compile and
      slower to run on a CPU.

  Returns:
    The networks; unpacks to (module, params, preprocessing).

  Raises:
    ValueError: one line about what is wrong with the file.
  """
  if jnp.dtype(dtype) == jnp.float64 and not jax.config.jax_enable_x64:
    raise ValueError(
      'dtype "float64" needs jax.config.update("jax_enable_x64", True) first.'
    )
  weights = convert.read(path, num_heads=num_heads, step=step)
  if which is None:
    which = "target" if "target" in weights.networks else "context"
    source = paths.local(path, "path of weights")
    as_usual = runs.workdir_of(source) or hugging_face.is_folder(source)
    if which == "context" and source.exists() and not as_usual:
      logging.warning("%s has no target encoder: using the context's", path)
  weights.only(which)  # ValueError where there is none
  compute = dict(dtype=jnp.dtype(dtype), scan=scan)
  networks = jax.tree.map(jnp.asarray, weights.networks)
  has_predictor = "predictor" in networks
  return Pretrained(
    module=weights.module(which, **compute),
    params=networks[which],
    preprocessing=Preprocessing(
      weights.mean,
      weights.std,
      tuple(weights.image_size),
      str(jnp.promote_types(dtype, jnp.float32)),
    ),
    which=which,
    networks=networks,
    predictor=weights.module("predictor", **compute) if has_predictor else None,
  )


def _features(module, preprocessing, layers, pool, unit_range, params, images):
  images = preprocessing(images, unit_range=unit_range)
  x = module.apply({"params": params}, images, layers=layers)
  x = x.astype(preprocessing.dtype)
  if pool == "mean":
    return x.mean(axis=1)
  grid = models.patch_grid(*images.shape[1:3], module.patch_size)
  return x.reshape(x.shape[0], *grid, x.shape[-1])


@functools.cache
def _encoder() -> Any:
  """_features, jitted with what suits the default backend."""
  on_cpu = jax.default_backend() == "cpu"
  options = cpu.known_options(cpu.FORWARD_OPTIONS if on_cpu else {})
  static = (0, 1, 2, 3, 4)
  return jax.jit(_features, static_argnums=static, compiler_options=options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    encoder, predictor, preprocessing, unit_range, params, images,
    context_ids, target_ids, context_valid, target_valid,
):  # fmt: skip
  images = preprocessing(images, unit_range=unit_range)
  grid = models.patch_grid(*images.shape[1:3], encoder.patch_size)
  context = encoder.apply(
    {"params": params[0]}, images, context_ids, context_valid
  )
  return predictor.apply(
      {"params": params[1]}, context, context_ids, target_ids, grid,
      context_valid, target_valid,
  ).astype(preprocessing.dtype)  # fmt: skip
