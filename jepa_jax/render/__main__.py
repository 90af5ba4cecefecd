"""The worker process of `examples.stream`: writes its share to stdout."""

import json
import os
import pickle
import signal
import struct
import sys

from jepa_jax.render import examples


def main(job: str) -> None:
  """Writes this worker's share of the examples to standard output."""
  seed, split, first, count, step, image_size = json.loads(job)
  output = sys.stdout.buffer
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The reader ends its workers.
  try:
    for index in range(first, count, step):
      payload = pickle.dumps(
        examples.example(seed, split, index, image_size), 5
      )
      output.write(struct.pack("<Q", len(payload)))
      output.write(payload)
      output.flush()
  except BrokenPipeError:
    os._exit(1)  # The reader has ended, and nobody would read a message.


if __name__ == "__main__":
  main(sys.argv[1])
