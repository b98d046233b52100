"""`moevision data score`: one pass over the images of a run; the page and the table made of it and of the scores."""
