"""The one idea: results, the registry of analyses, policies and inputs. Start at `analysis.py`."""
