if __name__ != "nmm_serve.cli":
    raise ImportError(f"{__name__} was imported from the source folder; import nmm_serve.cli instead")
