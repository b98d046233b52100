"""Several labels of an image, on pairs of Imagenette."""
