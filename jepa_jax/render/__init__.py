"""Draws small CLEVR-like scenes with NumPy alone: lit solids on a plane.

    image = examples.example(seed=0, split="train", index=0, image_size=64)

A scene is a pure function of (seed, split, index), so any number of
processes, in any order, draws the same bytes.

`world` says what a scene consists of, `sampling` draws a random one, `casting`
finds what each ray meets, `shading` colours it, `examples` makes a data set.
The room imports neither TensorFlow nor JAX: worker processes start fast.

Reference: Johnson et al. 2017, section 3 and appendix A, arXiv:1612.06890.
"""
