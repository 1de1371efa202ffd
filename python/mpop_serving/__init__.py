"""What the plug-ins for vLLM and SGLang share: layers held as cores, and their names."""
