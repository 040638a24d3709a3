"""Deployments (how models are served): their settings, which of them are loaded, and which engine (model server)
answers requests for a model.
"""
