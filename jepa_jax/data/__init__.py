"""Sources, order, augmentation and masks: what feeds a training step.

The only room that imports TensorFlow at module level. TensorFlow decodes and
resizes on the host; it must never claim an accelerator, so every device but
the CPU is hidden from it here, before any module of the room runs.
"""

from collections.abc import Iterator
import contextlib
import os
import re
import tempfile

# Notes that TensorFlow writes while it is imported, whatever its level of
# logging; they would cut through progress bars.
_NOTES = re.compile(rb"I\d{4} |WARNING: All log messages before absl|\s*$")


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
  """Holds standard error back, and lets all but the notes through."""
  with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
    try:
      error = os.dup(2)
    except OSError:  # closed
      yield
      return
    stack.callback(os.close, error)
    os.dup2(held.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(error, 2)
      held.seek(0)
      for line in held:
        if not _NOTES.match(line):
          os.write(2, line)


with _without_notes():
  import tensorflow as tf

  for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)
