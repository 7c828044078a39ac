"""From bytes to uint8 pixels of a bucket's size, or to one reason why not.

    bytes --strip--> what a decoder needs --decode--> 8 bits under limits --render--> RGB uint8 [h, w, 3]
    prepare   a row to its variants or to one Reject, here or, for decoders that may be slow or crash, in a child
              process with CPU and memory limits; policy_fingerprint says all that decides pixels (DECODE.md)
    render    (height, width) to bucket and crop box, and every resolution of one image from one decode
    decode    by format: Pillow, and tifffile for every layout of TIFF
    strip     what a decoder need not see is left out; a JPEG without its end, told from one that was cut
    samples   bits and modes to six kinds of picture, and those to sRGB by what of a profile can be trusted

No bytes, however hostile, raise or hang.
"""
