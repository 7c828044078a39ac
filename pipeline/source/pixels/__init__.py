"""From bytes to uint8 pixels of a bucket's size, or to one reason why not.

    bytes --decode--> a loaded image under limits --render--> RGB uint8 [h, w, 3] of every resolution
    prepare   a row to its variants or to one Reject; policy_fingerprint says all that decides pixels (DECODE.md)
    sandbox   the same in a child process with CPU and memory limits, for decoders that may be slow or crash
    render    colours to sRGB, orientation, and (height, width) to bucket and crop box: arithmetic only

No bytes, however hostile, raise or hang.
"""
