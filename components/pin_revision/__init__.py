"""KFP component that pins the commit of the data and the version of the CLIP."""
