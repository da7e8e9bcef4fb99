"""Generation and scoring with a cache of keys, values and index keys: see `engine.InferenceEngine`."""
