"""The certificate: figures of a model by independent estimators, and checks of how they were computed."""
