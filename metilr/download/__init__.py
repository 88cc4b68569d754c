"""Files from the network: the official archives of the Met dataset, and how any file is fetched whole."""
