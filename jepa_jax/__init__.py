"""I-JEPA in JAX: pretraining, evaluation and reports.

Importing this package loads neither TensorFlow nor JAX.
"""

__version__ = "0.1.0"
