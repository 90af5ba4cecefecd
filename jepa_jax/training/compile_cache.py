"""What XLA has compiled is kept: a restart reaches its first step sooner."""

import hashlib
import os
import pathlib
import platform
import tempfile

from absl import logging
import jax

_LEAST_SECONDS = 0.3  # what compiles faster is not worth a file


def use(setting: str) -> pathlib.Path | None:
  """Turns on JAX's persistent cache of compiled programs, for this process.

  A cache that cannot be written to is left off. JAX_COMPILATION_CACHE_DIR, if
  set, says where and whether.

  Args:
    setting: config.compute.cache.

  Returns:
    The folder, None where there is none.
  """
  if not setting or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return None
  try:
    folder = _folder(setting)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except (OSError, RuntimeError) as error:  # Without a home, RuntimeError.
    logging.info("no cache of compiled programs: %s", error)
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS
  )
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
  return folder


def _folder(setting: str) -> pathlib.Path:
  if setting != "auto":
    return pathlib.Path(setting).expanduser()
  base = os.environ.get("XDG_CACHE_HOME")
  base = pathlib.Path(base) if base else pathlib.Path.home() / ".cache"
  # A home may be shared by machines whose CPUs know other instructions. XLA
  # would warn of each program at length, and an instruction may be missing.
  return base / "jepa_jax" / "compiled" / _cpu()


def _cpu() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # no Linux
    lines = []
  flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
  digest = hashlib.sha256(" ".join(sorted(flags.split())).encode())
  return f"{platform.machine()}-{digest.hexdigest()[:8]}"
