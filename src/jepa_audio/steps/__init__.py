"""The six steps of a JEPA: front ends, masking, encoder, targets, predictor, losses."""
