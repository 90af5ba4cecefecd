"""glibc's allocator, set for train steps on a CPU; nothing else knows of it.

By default glibc gives the buffers of a step back to the kernel, which faults
every page in again in the next step. Told to keep them, and to keep one arena
for all threads, it ends these faults: 1,000 of 2 MiB a step were left with an
arena a thread, and they took up to a third of the step's time. The price is
memory: some steps hold two to five freed buffers more of the largest size.
"""

import glob
import os
import sys

_TUNABLES = ":".join(
  (
    "glibc.malloc.hugetlb=1",  # huge pages: fewer faults at the start
    "glibc.malloc.mmap_max=0",  # nothing is mapped beside the heap
    "glibc.malloc.trim_threshold=100000000000",  # nothing goes back
    "glibc.malloc.arena_max=1",  # one heap for all threads
  )
)

_NEW = "JEPA_JAX_STARTED_ANEW"  # tells the new process that it is one


def set_for_training() -> None:
  """Starts this process anew with the settings, see `say`.

  To be called before anything takes long, or is said, for it comes twice.

  glibc reads its settings before Python starts. Nothing is done on other
  systems than Linux, where an accelerator is found, or where the environment
  sets GLIBC_TUNABLES already, as in the new process and its children.
  """
  accelerators = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*")
  accelerators += glob.glob("/dev/vfio/[0-9]*")
  platforms = os.environ.get("JAX_PLATFORMS", "")
  on_cpu = platforms == "cpu" or not (platforms or accelerators)
  if not on_cpu or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
    return
  os.environ["GLIBC_TUNABLES"] = os.environ[_NEW] = _TUNABLES
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say() -> None:
  """Says on standard error that this process was started anew, if it was."""
  if settings := os.environ.pop(_NEW, None):
    print(
      f"started anew with GLIBC_TUNABLES={settings}, so that a step on the CPU "
      "finds its memory where the last one left it; set GLIBC_TUNABLES, to "
      "nothing or other settings, to have it otherwise",
      file=sys.stderr,
      flush=True,
    )
