"""Experiments of a course on neural networks, built from pykern's modules: pykern.course.digits."""
