"""The few weights that train beside a model's own: settings, layers, folders."""
