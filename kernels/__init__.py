if __name__ != "nmm_serve.kernels":
    raise ImportError(f"{__name__} was imported from the source folder; import nmm_serve.kernels instead")
