"""Tasks beside training: score a folder of images, generate one, evaluate checkpoints, run jobs one after the other."""
