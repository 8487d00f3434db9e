"""DeepSpeed: the generated configuration, the engine, the learning-rate schedule, evaluation."""
