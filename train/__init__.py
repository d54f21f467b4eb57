if __name__ != "nmm_serve.train":
    raise ImportError(f"{__name__} was imported from the source folder; import nmm_serve.train instead")
