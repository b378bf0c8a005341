"""Fine-tune an encoder on a labelled task: data, network, training and results."""
