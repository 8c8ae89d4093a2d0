"""What a run says: metrics, trackers, the screen, the model card."""
