"""Embeddings kept to be searched: what is indexed, how it is kept, and what finds the nearest."""
