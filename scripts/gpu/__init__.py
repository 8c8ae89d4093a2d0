"""What `check_gpu.py` measures, stage by stage."""
