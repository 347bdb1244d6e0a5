"""What is made from nothing or compared: the demo's world, its tiny backbones, and comparisons of systems."""
