if __name__ != "nmm_serve.evals":
    raise ImportError(f"{__name__} was imported from the source folder; import nmm_serve.evals instead")
