"""Encoders as models of benchmarks and of scikit-learn, one module for each."""
