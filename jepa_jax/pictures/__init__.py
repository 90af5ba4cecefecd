"""Pictures of what a network has learned, as arrays and matplotlib figures.

  patches     features, similarity and attention of patches, as arrays
  drawings    figures of masks, features, similarity and attention
  errors      how well blocks are predicted, against distance
  embedding   a map of a data set, and nearest neighbours
  training    curves of several runs; features over training, as a film
  decoders    a decoder's run, and the file that one is handed on in
  decoding    what features say of an image, drawn by a decoder
  images      images of a folder, or of a run's own data, and their classes
  shown       the networks and images that the command's flags name
  layout      sheets of pictures with words, and files of them

All but `images`, `shown` and a decoder's run work without TensorFlow.

EXAMPLE is the file of a small encoder to try them with: the target encoder of
experiments/quickstart.py, 2,000 steps on rendered scenes of 64 pixels.
DECODER is that of a small decoder of it, for `decoders.load`.
"""

import pathlib

EXAMPLE = pathlib.Path(__file__).with_name("scenes.safetensors")
DECODER = pathlib.Path(__file__).with_name("decoder.safetensors")
